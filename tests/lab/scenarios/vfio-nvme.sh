# a guest has an NVMe disk through VFIO: admin queue, identify, blocks written and read, two MSI-X vectors, D3hot
MACHINE=linux
DEVICE=0000:00:08.0
story() {
  must "the backend starts" start_backend
  must "the disk is hidden" pciback hide $DEVICE
  must "a guest has it" new_guest one $DEVICE
  check "it identifies the disk" drive one nvme identify
  check "writes blocks and reads them back" drive one nvme write
  check "reads its MSI-X table as it is programmed" drive one nvme table
  check "and reads what was there" has $NVME_SUM eval 'drive one nvme first | first_mib'
  check "it sleeps in D3hot, and wakes" drive one function sleep wake
  check "and works" drive one nvme identify write
  check "the guest leaves it asleep" drive one function sleep
  check "and ends" end_guest one
  must "another guest gets it" new_guest two $DEVICE
  check "and finds it awake" drive two nvme identify
  check "that guest ends" end_guest two
  check "the disk is given back" pciback unhide $DEVICE
  check "and has what the guest wrote" has "written by lab-guest: block 4100" block 4100
  must "it is bound to vfio-pci by hand" bind_vfio $DEVICE
  check "a program without pcibackd drives it the same way" drive vfio:$DEVICE nvme identify write
  check "it is given back" unbind_vfio $DEVICE
}

block() {
  wait_for 20 [ -b /dev/nvme0n1 ] && dd if=/dev/nvme0n1 bs=512 skip=$1 count=1 2>/dev/null | tr -d '\000'
}
