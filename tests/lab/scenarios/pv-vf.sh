# a guest drives a virtual function of an igb with its own igbvf: the MAC address that dom0 set, traffic, MSI-X; and the guards around it
TIMEOUT=400
PF=0000:02:00.0
story() {
  [ $BACKEND = stock ] || must "the backend starts" start_backend
  modprobe igb
  must "dom0's driver has the physical function" wait_for 20 [ -e /sys/bus/pci/devices/$PF/net ]
  interface=$(ls /sys/bus/pci/devices/$PF/net)
  ip link set "$interface" up
  make_vfs 2
  check "dom0 sets the address of one" /usr/bin/ip link set "$interface" vf 0 mac 52:54:00:00:20:00
  [ $BACKEND = stock ] && must "the backend starts" start_backend
  check "xl takes it" xl pci-assignable-add 02:10.0
  must "a guest starts with it" create_guest pv 'pci=["02:10.0"]'
  check "the guest sees an ordinary device of its kind" has '00:00.0 "0200" "8086" "10ca"' guest pv lspci -mn
  check "its igbvf has the address that dom0 set" has 52:54:00:00:20:00 guest pv 'nic_up igbvf && cat /sys/class/net/eth0/address'
  check "with MSI-X, three vectors" has 3 guest pv 'grep -c pcifront-msi-x /proc/interrupts'
  check "it pings" guest pv ping -c 5 -A -W 5 10.0.2.2
  check "by interrupts" guest pv 'a=$(irqs) && ping -c 5 -A -W 5 10.0.2.2 && b=$(irqs) && echo "$a then $b" && [ $b -gt $a ]'
  [ $BACKEND = stock ] || guards
  check "the guest shuts down" shut_down pv
  check "it is assignable again" has 0000:02:10.0 xl pci-assignable-list
  [ $BACKEND = stock ] || away_and_back
  [ $BACKEND = stock ] && check "xl gives it back" xl pci-assignable-remove 02:10.0
  check "the virtual functions are taken away" destroy_vfs
  check "all of them" not ls /sys/bus/pci/devices/0000:02:10.0
  check "dom0's driver works on" dom0_pings $PF
  rmmod igb
}

make_vfs() {
  case $BACKEND in
    stock) check "virtual functions are made" sh -c "echo $1 >/sys/bus/pci/devices/$PF/sriov_numvfs" ;;
    *) check "pciback makes virtual functions" pciback vf create "$1" $PF ;;
  esac
}

destroy_vfs() {
  case $BACKEND in
    stock) echo 0 >/sys/bus/pci/devices/$PF/sriov_numvfs ;;
    *) pciback vf destroy $PF ;;
  esac
}

guards() {
  check "pciback vf list says who has it" has pv pciback vf list
  check "they are not taken away under the guest" not pciback vf destroy $PF
  check "the physical function is not hidden" not pciback hide $PF
  check "xl is kept from unbinding its driver" not xl pci-assignable-add $PF
  check "which is said why" has "guests have virtual functions of $PF: domain" cat $LOG
  check "nobody else takes them away" not sh -c "echo 0 >/sys/bus/pci/devices/$PF/sriov_numvfs"
  check "the guest pings on" guest pv ping -c 3 -A -W 5 10.0.2.2
}

away_and_back() {
  check "pciback gives it back to dom0's driver" pciback unhide 02:10.0
  check "what is in nobody's use is taken away" pciback vf destroy $PF
  check "and made for guests, unseen by dom0's driver" pciback vf create 2 --hide $PF
  check "both are assignable" has 0000:02:10.2 xl pci-assignable-list
  # No driver in this guest: with interrupts bound, Xen would not survive what comes.
  must "a guest starts with one" create_guest other 'pci=["02:10.2"]'
  check "their driver is unloaded behind our back" rmmod igb
  check "they are forgotten" wait_for 5 eval '[ -z "$(xl pci-assignable-list)" ]'
  check "which is told" has "removed from this machine while" cat $LOG
  check "the guest reads ones" has ffffffff guest other setpci -s 00:00.2 0.l
  check "xl takes it from the guest, too" xl pci-detach other 02:10.2
  check "the guest has nothing any more" guest other 'wait_until [ ! -e /sys/bus/pci/devices/0000:00:00.2 ]'
  check "the driver comes back" modprobe igb
  check "virtual functions are made again" pciback vf create 1 --hide $PF
  check "the guest gets one" xl pci-attach other 02:10.0
  check "and sees it" guest other 'wait_until [ -e /sys/bus/pci/devices/0000:00:00.0 ]'
  check "by force it is taken away" pciback vf destroy --force $PF
  check "through xl" lacks 02:10.0 xl pci-list other
  check "no record is left" sh -c '[ -z "$(ls /run/pcibackd/devices)" ]'
}
