# a guest pings through an rtl8139, which has neither MSI nor MSI-X: its INTx line works through the GSI that xl maps
story() {
  must "the backend starts" start_backend
  check "xl takes the card" xl pci-assignable-add 00:06.0
  must "a guest starts with it" create_guest pv 'pci=["00:06.0"]'
  check "its driver brings the card up" guest pv nic_up 8139cp 8139too
  check "it pings" guest pv ping -c 5 -A -W 5 10.0.2.2
  check "the interrupts came by the line" guest pv "grep 'xen-pirq *-pcifront *eth0' /proc/interrupts | grep -v ' 0  '"
  check "there was no MSI" not guest pv 'grep pcifront-msi /proc/interrupts'
  check "the guest shuts down" shut_down pv
}
