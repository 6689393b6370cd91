# a guest has a device with several MSI vectors through VFIO, each of which arrives as its own event
MACHINE=linux
DEVICES="-device nec-usb-xhci,bus=pcie.0,addr=6,intrs=4,msi=on,msix=off"
USB=0000:00:06.0
has_vectors() { [ "$(grep -c "vfio-msi\[[0-9]*\]($USB)" /proc/interrupts)" = "$1" ]; }
story() {
  must "the backend starts" start_backend
  must "a USB controller is hidden" pciback hide $USB
  must "a guest has it" new_guest one $USB
  check "the kernel has no vector for it so far" has_vectors 0
  { drive one xhci msi && echo served; } >$STATE/msi 2>&1 &
  check "it has four as soon as the guest's driver is at work" wait_for 20 has_vectors 4
  check "each of them interrupts, and no other with it" wait_for 20 has served cat $STATE/msi
  check "once more, with a driver that is loaded anew" drive one xhci msi
  check "the guest ends" end_guest one
  check "the kernel has taken the vectors down" has_vectors 0
}
