# two virtual functions of a card in two guests, which reach each other through its switch; taken away by force, both guests live on
TIMEOUT=400
PF=0000:02:00.0
story() {
  mkdir -p /etc/pciback
  # Who insists gets his way without the toolstack, too
  printf '[commands]\ndetach = ["false"]\n' >/etc/pciback/pcibackd.toml
  must "the backend starts" start_backend
  modprobe igb
  must "dom0's driver has the physical function" wait_for 20 [ -e /sys/bus/pci/devices/$PF/net ]
  interface=$(ls /sys/bus/pci/devices/$PF/net)
  ip link set "$interface" up
  check "pciback makes and hides two virtual functions" pciback vf create 2 --hide $PF
  check "dom0 sets the address of one" /usr/bin/ip link set "$interface" vf 0 mac 52:54:00:00:20:00
  check "and of the other" /usr/bin/ip link set "$interface" vf 1 mac 52:54:00:00:20:01
  must "a guest starts with the first" create_guest one 'pci=["02:10.0"]'
  must "another with the second" create_guest two 'pci=["02:10.2"]'
  check "the first brings its card up" has 52:54:00:00:20:00 guest one 'nic_up igbvf && cat /sys/class/net/eth0/address'
  check "the second, too" has 52:54:00:00:20:01 guest two 'ADDRESS=10.0.2.16 nic_up igbvf && cat /sys/class/net/eth0/address'
  check "the first pings the second" guest one ping -c 5 -A -W 5 10.0.2.16
  check "and knows it by its address" has 52:54:00:00:20:01 guest one cat /proc/net/arp
  check "the second pings the first" guest two ping -c 5 -A -W 5 10.0.2.15
  check "the first is destroyed" destroy one
  check "the second pings the world" guest two ping -c 3 -A -W 5 10.0.2.2
  check "its card is not taken away" not pciback vf destroy $PF
  check "except by force" pciback vf destroy --force $PF
  check "the guest's driver finds nothing any more" guest two 'ip link set eth0 down; echo survived'
  check "xl takes it from the guest, too" xl pci-detach two 02:10.2
  check "the guest shuts down" shut_down two
  check "dom0's driver works on" dom0_pings $PF
  rmmod igb
}
