# an NVMe disk through VFIO: admin queue, identify, blocks written and read, two MSI-X vectors
MACHINE=linux
story() {
  must "the disk is bound to vfio-pci" bind_vfio 0000:00:08.0
  check "a program without pcibackd identifies it" lab-guest drive nvme vfio:0000:00:08.0 identify
  check "writes blocks and reads them back" lab-guest drive nvme vfio:0000:00:08.0 write
  check "reads what was there" has $NVME_SUM eval 'lab-guest drive nvme vfio:0000:00:08.0 first | first_mib'
  check "the disk is given back" unbind_vfio 0000:00:08.0
  check "and has what was written" has "written by lab-guest: block 4100" block 4100
}

block() {
  wait_for 20 [ -b /dev/nvme0n1 ] && dd if=/dev/nvme0n1 bs=512 skip=$1 count=1 2>/dev/null | tr -d '\000'
}
