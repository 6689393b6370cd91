# an unmodified guest drives an e1000e with MSI-X, by stock xl; afterwards dom0 has the card back
story() {
  modprobe e1000e
  check "dom0 pings through the card before" dom0_pings 0000:00:05.0
  must "the backend starts" start_backend
  [ $BACKEND = stock ] || check "the kernel's pciback is not loaded" [ ! -e /sys/module/xen_pciback ]

  check "xl takes the card from dom0's driver" xl pci-assignable-add 00:05.0
  check "xl lists it as assignable" has 0000:00:05.0 xl pci-assignable-list
  must "a guest starts with pci=[]" create_guest pv 'pci=["00:05.0"]'
  check "the card is no longer assignable" lacks 0000:00:05.0 xl pci-assignable-list
  check "the guest sees it at 00:00.0" has '00:00.0 "0200" "8086" "10d3"' guest pv lspci -mn
  check "its driver brings the card up" guest pv nic_up e1000e
  check "it pings" guest pv ping -c 5 -A -W 5 10.0.2.2
  check "with MSI-X, three vectors" has 3 guest pv 'grep -c pcifront-msi-x /proc/interrupts'
  [ $BACKEND = stock ] || the_command_line_knows

  check "the guest shuts down" shut_down pv
  check "the card is assignable again" has 0000:00:05.0 xl pci-assignable-list
  case $BACKEND in
    stock) check "xl gives it back" xl pci-assignable-remove -r 00:05.0 ;;
    *) check "pciback unhide gives it back" pciback unhide 00:05.0 ;;
  esac
  check "to dom0's driver" dom0_drives_it
  check "which pings" dom0_pings 0000:00:05.0

  check "xl takes it once more" xl pci-assignable-add 00:05.0
  check "and gives it back" xl pci-assignable-remove -r 00:05.0
  check "to dom0's driver, too" dom0_drives_it
  check "which pings as well" dom0_pings 0000:00:05.0
  rmmod e1000e
}

the_command_line_knows() {
  check "pciback list says who has it" has pv pciback list
  check "pciback show says what the guest sees" has 8086:10d3 pciback show 00:05.0
  check "pciback status says how the guest is" has Connected pciback status
}

dom0_drives_it() { [ "$(driver_of 0000:00:05.0)" = e1000e ]; }
