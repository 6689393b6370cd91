# a guest has QEMU's edu through VFIO: registers, ROM, DMA both ways, INTx and MSI; DMA elsewhere is stopped and told
MACHINE=linux
EDU=0000:00:05.0
stray_told() { grep "$EDU, which domain $(domid one) has, was to $1 0x" $LOG | grep "detach the device"; }
story() {
  must "edu is bound to vfio-pci by hand" bind_vfio $EDU
  check "a program without pcibackd has it compute" drive vfio:$EDU edu identify factorial
  check "copy" drive vfio:$EDU edu dma
  check "and interrupt" drive vfio:$EDU edu intx msi endevent
  must "it is given back" unbind_vfio $EDU
  must "the backend starts" start_backend
  must "edu is hidden" pciback hide $EDU
  must "a guest has it" new_guest one $EDU
  check "it computes" drive one edu identify factorial
  check "its expansion ROM has what it should" has $ROM_SUM eval 'drive one function rom | first_mib'
  check "copies to and from the guest's memory" drive one edu dma
  check "interrupts by its line" drive one edu intx
  check "and by messages" drive one edu msi
  check "by one after the other, twice" drive one edu intx msi intx msi
  check "nothing was stopped so far" not iommu_faults $EDU
  check "it copies where the guest has given it nothing" drive one edu stray
  check "which the IOMMU stops" iommu_faults $EDU
  check "pcibackd tells of the write, and whose device it was" wait_for 5 stray_told "write to"
  check "and of the read" wait_for 5 stray_told "read from"
  check "both are counted" has "DMA that the IOMMU has stopped: 2 times" pciback show $EDU
  check "and in the metrics" has "stopped_dma_total{device=\"$EDU\"} 2" pciback metrics
  check "the guest can still use it" drive one edu dma msi
  lab-guest drive edu "$RUN_DIR:$(domid one)" listen >$STATE/listen 2>&1 &
  check "it waits for a message" wait_for 20 has listening cat $STATE/listen
  check "meanwhile it loses the device" end_guest one
  must "another one gets it" new_guest two $EDU
  check "and can use it" drive two edu identify dma msi intx
  check "of which the former guest, still waiting, hears nothing" eval 'kill $! && lacks heard cat $STATE/listen'
}
