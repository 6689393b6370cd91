# pcibackd is killed with an operation in flight and started again: the guest notices nothing, and all that it asks for afterwards works
story() {
  must "the backend starts" start_backend
  check "xl takes two cards" xl pci-assignable-add 00:05.0
  check "the second as well" xl pci-assignable-add 01:00.0
  must "a guest starts with them" create_guest pv 'pci=["00:05.0", "01:00.0"]'
  check "it pings" guest pv 'nic_up e1000e && ping -c 3 -A -W 5 10.0.2.2'

  # Seen from the guest, one read takes as long as nobody serves; none fails, for xen-pcifront waits two seconds. A busy host makes us slow:
  # the best of a few.
  for _ in 1 2 3 4 5; do
    check "the guest reads" guest pv start_reads 0000:00:00.0
    check "killed with a read in flight, it starts again" restart_backend
    must "the guest's reads come to an end" reads_end pv
    check "not one was wrong" has ', 0 wrong' cat $STATE/reads
    [ "$(sed 's/.*took //; s/ ms//' $STATE/reads)" -lt 1000 ] && break
  done
  check "the longest took less than a second" [ $? = 0 ]

  check "killed once more, it leaves /sys/bus/pci/drivers alive" sysfs_outlives_backend
  check "and starts again" start_backend
  check "with pciback there" timeout 5 ls /sys/bus/pci/drivers/pciback/0000:00:05.0

  check "the guest still pings" guest pv ping -c 3 -A -W 5 10.0.2.2
  check "reads its devices' configuration" has '10d3 10d3' guest pv 'echo $(lspci -n | cut -d: -f4)'
  check "unloads its driver, which turns MSI-X off" guest pv rmmod e1000e
  check "loads it again, which turns MSI-X on" guest pv nic_up e1000e
  check "pings with it" guest pv ping -c 3 -A -W 5 10.0.2.2
  check "xl detaches the second card" xl pci-detach pv 01:00.0
  check "the guest has the first alone" has 0000:00:00.0 guest pv 'wait_until [ ! -e /sys/bus/pci/devices/0000:00:01.0 ]; ls /sys/bus/pci/devices'
  check "the guest shuts down" shut_down pv
  check "the first is assignable again" has 0000:00:05.0 xl pci-assignable-list
  check "and the second" has 0000:01:00.0 xl pci-assignable-list
}

restart_backend() {
  local begin
  begin=$(hundredths)
  kill_backend
  start_backend && echo "VALUE restart $(seconds $(($(hundredths) - begin))) s"
}

sysfs_outlives_backend() {
  kill_backend
  timeout 5 ls /sys/bus/pci/drivers >/tmp/drivers || return
  wait_for 2 not grep ' /sys/bus/pci/drivers ' /proc/mounts || return
  has pcieport timeout 5 ls /sys/bus/pci/drivers && lacks pciback timeout 5 ls /sys/bus/pci/drivers
}
