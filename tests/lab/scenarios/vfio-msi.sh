# a guest has a device with several MSI vectors through VFIO, each of which arrives as its own event
MACHINE=linux
DEVICES="-device nec-usb-xhci,bus=pcie.0,addr=6,intrs=4,msi=on,msix=off"
USB=0000:00:06.0
story() {
  must "the backend starts" start_backend
  must "a USB controller is hidden" pciback hide $USB
  must "a guest has it" new_guest one $USB
  check "each of four vectors interrupts, and no other with it" drive one xhci msi
  check "once more, with a driver that is loaded anew" drive one xhci msi
  check "the guest ends" end_guest one
  check "the kernel has taken the vectors down" not grep vfio-msi /proc/interrupts
}
