# What differs from ../dom0/words.sh where there is no Xen: pcibackd runs on the embedded one, with the machine's devices through VFIO.
# And the words about VFIO:
#
#   bind_vfio BDF...            binds devices to vfio-pci, as an operator would by hand; unbind_vfio gives them back
#   group_of BDF                the number of its IOMMU group
#   iommu_faults BDF            what the IOMMU has stopped of that device's DMA so far, by the kernel's log

bind_vfio() {
  local device
  for device in "$@"; do
    echo vfio-pci >"/sys/bus/pci/devices/$device/driver_override" || return
    [ ! -e "/sys/bus/pci/devices/$device/driver" ] || echo "$device" >"/sys/bus/pci/devices/$device/driver/unbind" || return
    echo "$device" >/sys/bus/pci/drivers_probe || return
    driven_by vfio-pci "$device" || return
  done
}

unbind_vfio() {
  local device
  for device in "$@"; do
    echo >"/sys/bus/pci/devices/$device/driver_override"
    echo "$device" >/sys/bus/pci/drivers/vfio-pci/unbind || return
    echo "$device" >/sys/bus/pci/drivers_probe
  done
}

group_of() { basename "$(readlink "/sys/bus/pci/devices/$1/iommu_group")"; }

iommu_faults() { dmesg | grep "DMAR: .*Request device \[${1#0000:}\]"; }

# --- as in dom0/words.sh

guests() { :; }

post_mortem() {
  echo "--- the kernel"; dmesg | tail -n 40
  [ ! -e $LOG ] || { echo "--- pcibackd"; tail -n 100 $LOG; }
}
