# two guests, a device each; neither gets the other's, and the end of one leaves the other running
story() {
  must "the backend starts" start_backend
  check "xl takes a card" xl pci-assignable-add 00:05.0
  check "and one more card" xl pci-assignable-add 01:00.0
  must "a guest starts with the first" create_guest one 'pci=["00:05.0"]'
  check "no other guest gets the same one" not create_guest two 'pci=["00:05.0"]'
  must "another starts with the second" create_guest two 'pci=["01:00.0"]'
  check "the first sees its own alone" has 52:54:00:00:00:05 guest one 'nic_up e1000e && cat /sys/class/net/*/address'
  check "and the second its own" has 52:54:00:00:00:10 guest two 'nic_up e1000e && cat /sys/class/net/*/address'
  check "one device each" has 1 guest two 'ls /sys/bus/pci/devices | wc -l'
  check "the first pings" guest one ping -c 3 -A -W 5 10.0.2.2
  check "the second pings" guest two ping -c 3 -A -W 5 10.0.2.2
  check "the first is destroyed" destroy one
  check "the second still pings" guest two ping -c 3 -A -W 5 10.0.2.2
  check "and reads its configuration" has 8086 guest two lspci -n
  check "the first card is free again" has 0000:00:05.0 xl pci-assignable-list
  check "the second is not" lacks 0000:01:00.0 xl pci-assignable-list
}
