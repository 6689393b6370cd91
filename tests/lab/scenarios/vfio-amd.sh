# behind AMD's IOMMU, a guest has its device copy to and from its memory, and interrupt; so has the next one
MACHINE=linux
IOMMU=amd
ALONE=yes
EDU=0000:00:05.0
story() {
  must "the IOMMU is AMD's" has ivhd ls /sys/class/iommu
  must "the backend starts" start_backend
  must "edu is hidden" pciback hide $EDU
  must "a guest has it" new_guest one $EDU
  check "it computes" drive one edu identify factorial
  check "copies to and from the guest's memory" drive one edu dma
  check "interrupts by its line" drive one edu intx
  check "and by messages" drive one edu msi
  # That this is stopped, nobody hears of: see host/linux.sh
  check "it copies where the guest has given it nothing" drive one edu stray
  check "the guest can still use it" drive one edu dma msi
  check "the guest ends" end_guest one
  must "another one gets it" new_guest two $EDU
  check "and can use it" drive two edu identify dma msi
}
