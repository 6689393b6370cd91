# a guest reads an NVMe disk; its driver sets MSI-X up with one vector, gives it back, and asks for two (the stock backend fails that)
story() {
  must "the backend starts" start_backend
  check "xl takes the disk" xl pci-assignable-add 00:08.0
  must "a guest starts with it" create_guest pv 'pci=["00:08.0"]'
  check "its driver finds the disk" guest pv 'modprobe nvme; wait_until [ -b /dev/nvme0n1 ]'
  check "what it reads is what was written" has $NVME_SUM guest pv sum_of /dev/nvme0n1
  check "with two MSI-X vectors" has 2 guest pv 'grep -c pcifront-msi-x.*nvme /proc/interrupts'
  check "the guest shuts down" shut_down pv
}
