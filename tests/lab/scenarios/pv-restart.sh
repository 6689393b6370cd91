# pcibackd is killed with an operation in flight and started again: the guest notices nothing, and all that it asks for afterwards works
story() {
  must "the backend starts" start_backend
  check "xl takes two cards" xl pci-assignable-add 00:05.0
  check "the second as well" xl pci-assignable-add 01:00.0
  must "a guest starts with them" create_guest pv 'pci=["00:05.0", "01:00.0"]'
  check "it pings" guest pv 'nic_up e1000e && ping -c 3 -A -W 5 10.0.2.2'

  guest pv 'lab-guest reads 0000:00:00.0 12 >/tmp/reads 2>&1 &'
  sleep 2
  kill_backend
  check "killed with a read in flight, it serves again within a second" restart_backend
  check "/sys/bus/pci/drivers is alive while it runs" timeout 5 ls /sys/bus/pci/drivers/pciback
  sleep 1
  kill_backend
  check "and while it does not" timeout 5 ls -d /sys/bus/pci/drivers/pcieport
  check "but pciback is not there" not ls -d /sys/bus/pci/drivers/pciback
  check "a second time, it serves again within a second" restart_backend
  check "the guest's reads come to an end" guest pv 'wait_until [ -s /tmp/reads ]'
  guest pv cat /tmp/reads
  check "not one was wrong" has ' 0 wrong' guest pv cat /tmp/reads

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

kill_backend() { kill -9 "$(cat $STATE/pid)"; }

# Starts it and says how long that took, until it answers
restart_backend() {
  local begin
  begin=$(hundredths)
  start_backend || return
  begin=$(($(hundredths) - begin))
  echo "VALUE restart $(seconds $begin) s"
  [ $begin -le 100 ]
}
