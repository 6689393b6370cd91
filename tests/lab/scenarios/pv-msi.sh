# a guest reads a disk behind an AHCI controller, which interrupts by MSI
story() {
  must "the backend starts" start_backend
  check "xl takes the controller" xl pci-assignable-add 00:07.0
  must "a guest starts with it" create_guest pv 'pci=["00:07.0"]'
  check "its driver finds the disk" guest pv 'modprobe ahci; modprobe sd_mod; wait_until [ -b /dev/sda ]'
  check "what it reads is what was written" has $SATA_SUM guest pv sum_of /dev/sda
  check "the interrupts were MSI" guest pv "grep 'pcifront-msi .*ahci' /proc/interrupts | grep -v ' 0  '"
  check "the guest shuts down" shut_down pv
}
