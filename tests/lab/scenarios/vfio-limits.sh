# What VFIO needs and is not there is told with the remedy, and nothing stays half-way: its driver, the right to lock memory
MACHINE=linux
EDU=0000:00:05.0
CARD=0000:03:02.0
unload() { rmmod vfio-pci; }
doctor_says() { pciback doctor | grep "$1"; }
# Root without CAP_IPC_LOCK, as a unit that has not been given it
start_limited() {
  /usr/bin/setpriv --bounding-set=-ipc_lock --inh-caps=-ipc_lock sh -c "ulimit -l 64; exec pcibackd $PCIBACKD_FLAGS" >>$LOG 2>&1 &
  echo $! >$STATE/pid
  wait_for 20 backend_is_ready
}
start_mapping() { PCIBACKD_FLAGS="$PCIBACKD_FLAGS --map-bars" start_backend; }
# A guest's process that hangs: it has the device's registers mapped, and no guest is behind it any more
hang() { kill -STOP "$(pidof lab-guest)"; }
end_hanging() { kill -KILL "$(pidof lab-guest)" && wait_for 5 not pidof lab-guest; }

without_kernel_log() {
  mv /dev/kmsg /dev/away
  start_limited && wait_for 5 grep "DMA .* that the IOMMU stops is told by the kernel only .*CAP_SYSLOG" $LOG
  local status=$?
  mv /dev/away /dev/kmsg
  return $status
}
start_small() { PCIBACKD_FLAGS="$PCIBACKD_FLAGS --guest-memory 0" start_backend; }

story() {
  must "the backend starts" start_backend
  must "vfio-pci is not loaded" unload
  check "no device is hidden without it, and the remedy is told" refused "modprobe vfio-pci" pciback hide $CARD
  check "the device has its driver as before" driven_by e1000 $CARD
  check "doctor says so, too" doctor_says "modprobe vfio-pci"
  must "it is loaded" modprobe vfio-pci
  check "doctor has nothing to say of the host" doctor_says "it is loaded"
  must "the backend stops" stop_backend
  must "one starts that may lock 64 KiB, and says what it cannot tell without the kernel's log" without_kernel_log
  check "a device is hidden" pciback hide $EDU
  must "a guest has it" new_guest one $EDU
  check "and cannot give it memory" refused "giving memory for DMA" drive one edu identify
  check "the log tells how much may be locked" grep "may lock 65536 bytes" $LOG
  check "and the remedy" grep "LimitMEMLOCK=infinity" $LOG
  check "the guest ends" end_guest one
  check "the device is given back" pciback unhide $EDU
  must "the backend stops again" stop_backend
  must "one starts whose guests may map registers" start_mapping
  must "the device is hidden" pciback hide $EDU
  must "a guest gets it" new_guest one $EDU
  drive one edu last >$STATE/last 2>&1 &
  must "and maps its registers" wait_for 10 grep using $STATE/last
  must "its process hangs" hang
  check "the guest ends all the same" end_guest one
  check "the device is nobody's" wait_for 20 hidden $EDU
  check "no other guest gets it as long as it is mapped" refused "attaching" new_guest two $EDU
  check "the log says why, and the remedy" grep "fuser -v /dev/vfio" $LOG
  check "it can be looked at as little, and that says so" refused "fuser" pciback show $EDU
  check "nor can it be reset" refused "fuser" pciback reset $EDU
  check "nor given back to the host" refused "fuser" pciback unhide $EDU
  check "it is hidden, and not dead" hidden $EDU
  must "the process ends" end_hanging
  check "the device can be looked at then" has "Vendor ID" pciback show $EDU
  must "another guest gets it" new_guest three $EDU
  check "and can use it" drive three edu identify
  check "that guest ends" end_guest three
  check "and the device is given back" pciback unhide $EDU
  must "the backend stops once more" stop_backend
  must "one starts whose guests may give nothing" start_small
  check "a device is hidden" pciback hide $EDU
  must "a guest has it" new_guest two $EDU
  check "and cannot give it memory" refused "giving memory for DMA" drive two edu identify
  check "the log tells what it may give, and the remedy" grep "may give 0 in all.*--guest-memory" $LOG
  check "the guest ends" end_guest two
}
