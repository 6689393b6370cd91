# guests have registers mapped, as far as they are none of MSI-X's: an NVMe disk and a card work as ever, and the MSI-X table is trapped
MACHINE=linux
NVME=0000:00:08.0
CARD=0000:01:00.0
story() {
  must "one starts whose guests may not map registers" start_backend
  must "two devices with MSI-X are hidden" eval 'pciback hide $NVME && pciback hide $CARD'
  must "a guest has both" new_guest one $NVME $CARD
  check "nothing of the disk is mapped" refused "nothing of BAR" drive one:1 function split
  check "nor of the card" refused "nothing of BAR" drive one:2 function split
  check "the guest ends" end_guest one
  must "the backend stops" stop_backend
  PCIBACKD_FLAGS="$PCIBACKD_FLAGS --map-bars"
  must "one starts whose guests may" start_backend
  must "both are hidden again" eval 'pciback hide $NVME && pciback hide $CARD'
  must "a guest has the disk" new_guest one $NVME
  must "another guest has the card" new_guest two $CARD
  check "the disk's registers are mapped, and what is MSI-X's is not" drive one function split
  check "it is identified, writes, and its MSI-X table reads as it is programmed" drive one nvme identify write table
  check "the card's registers are mapped, and what is MSI-X's is not" drive two function split
  check "it is identified, and interrupts by each vector" drive two igb identify msix
  check "both end" eval 'end_guest one && end_guest two'
}
