# What VFIO needs and a host does not give is told with the remedy, and nothing stays half-way: a device that no IOMMU is for, /dev/vfio, sysfs asked for
MACHINE=linux
DEVICES="-device pxb-pcie,id=bypass,bus=pcie.0,addr=10,bus_nr=128,bypass_iommu=on -device pcie-root-port,id=port80,bus=bypass,chassis=80 -device edu,bus=port80"
OUTSIDE=0000:81:00.0
EDU=0000:00:05.0
CARD=0000:01:00.0
as_before() { driven_by igb $CARD && untouched $CARD && untouched $EDU && not driven_by vfio-pci $EDU; }
untouched() { [ "$(cat "/sys/bus/pci/devices/$1/driver_override")" = "(null)" ] && not_hidden "$1"; }
doctor_says() { pciback doctor "$2" | grep -A 1 "$1"; }
unprivileged_doctor_says() { $UNPRIVILEGED pciback doctor | grep -A 1 "$1"; }

# Root, without the rights that let it pass by permissions
UNPRIVILEGED="/usr/bin/setpriv --bounding-set=-dac_override,-dac_read_search --inh-caps=-dac_override,-dac_read_search"
start_unprivileged() {
  $UNPRIVILEGED pcibackd $PCIBACKD_FLAGS >>$LOG 2>&1 &
  echo $! >$STATE/pid
  wait_for 20 backend_is_ready
}
# In a container that was given /dev/vfio/vfio, and not what comes later
start_contained() {
  unshare -m sh -c "mount --make-rprivate / 2>/dev/null; mount -t tmpfs none /dev/vfio && mknod /dev/vfio/vfio c 10 196 && exec pcibackd $PCIBACKD_FLAGS" >>$LOG 2>&1 &
  echo $! >$STATE/pid
  wait_for 20 backend_is_ready
}
# choose HOST: how EDU is to be reached
choose() {
  mkdir -p /etc/pciback
  printf '[[device]]\nbdf = "%s"\nhost = "%s"\n' $EDU "$1" >/etc/pciback/pcibackd.toml
}

story() {
  must "the backend starts" start_backend
  check "a device is in no IOMMU group" [ ! -e /sys/bus/pci/devices/$OUTSIDE/iommu_group ]
  check "it is refused, and the remedy told" refused "intel_iommu=on" pciback hide $OUTSIDE
  check "as a group, too" refused "intel_iommu=on" pciback hide --group $OUTSIDE
  check "and nothing has been done to it" untouched $OUTSIDE
  check "no guest gets it" refused "attaching" new_guest one $OUTSIDE
  check "and nothing is left of the first guest, which was to have it" refused "destroying domain 1 failed" toolstack destroy 1
  check "doctor says so" doctor_says "no IOMMU group" $OUTSIDE
  must "the backend stops" stop_backend

  chmod 0 /dev/vfio
  must "one starts that may not use /dev/vfio" start_unprivileged
  check "it hides nothing, and tells the remedy" refused "DeviceAllow=char-vfio" pciback hide $CARD
  check "nor a device without a driver" refused "DeviceAllow=char-vfio" pciback hide $EDU
  check "everything is as before" as_before
  check "doctor says so to who may not either" unprivileged_doctor_says "may not be used"
  chmod 755 /dev/vfio
  check "with the right, the same backend hides it" pciback hide $CARD
  must "the backend stops, and gives it back" stop_backend
  check "to its driver" wait_for 10 driven_by igb $CARD

  must "one starts that sees no groups in /dev/vfio" start_contained
  check "it hides nothing, and tells the remedy" refused "in a container, have all of /dev/vfio" pciback hide $CARD
  check "nor a device without a driver" refused "in a container, have all of /dev/vfio" pciback hide $EDU
  check "everything is as before" as_before
  must "the backend stops once more" stop_backend

  choose sysfs
  must "one starts that is to reach a device through sysfs" start_backend
  check "it does not hide it, and says why" refused 'host = "sysfs" is set for it' pciback hide $EDU
  check "and tells the remedy" refused 'Set host = "auto"' pciback hide $EDU
  check "doctor says so, too" doctor_says 'host = "sysfs" is set for it' $EDU
  check "and tells where to look" doctor_says "pciback set $EDU shows" $EDU
  check "everything is as before" as_before
  must "it stops" stop_backend
  choose vfio
  must "one starts that is to reach it through VFIO" start_backend
  check "which hides it" pciback hide $EDU
  check "doctor finds nothing wrong with how" not doctor_says "host = " $EDU
  must "a guest has it" new_guest two $EDU
  check "and can use it" drive two edu identify dma msi
}
