# QEMU's edu through VFIO: registers, DMA both ways, INTx and MSI; DMA elsewhere is stopped
MACHINE=linux
story() {
  must "edu is bound to vfio-pci" bind_vfio 0000:00:05.0
  check "a program without pcibackd finds it" lab-guest drive edu vfio:0000:00:05.0 identify factorial
  check "has it copy to and from its memory" lab-guest drive edu vfio:0000:00:05.0 dma
  check "is interrupted by its line" lab-guest drive edu vfio:0000:00:05.0 intx
  check "by messages" lab-guest drive edu vfio:0000:00:05.0 msi
  check "nothing was stopped so far" not iommu_faults 0000:00:05.0
  check "has it copy elsewhere" lab-guest drive edu vfio:0000:00:05.0 stray
  check "which the IOMMU stops" iommu_faults 0000:00:05.0
  check "edu is given back" unbind_vfio 0000:00:05.0
}
