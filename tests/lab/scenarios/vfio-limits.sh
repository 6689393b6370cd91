# What VFIO needs and is not there is told with the remedy, and nothing stays half-way: its driver, the right to lock memory
MACHINE=linux
EDU=0000:00:05.0
OTHER_EDU=0000:05:00.0
BEHIND_BRIDGE=0000:03:01.0 # and in one group with the next
CARD=0000:03:02.0
unload() { rmmod vfio-pci; }
doctor_says() { pciback doctor | grep "$1"; }
# Root without CAP_IPC_LOCK, as a unit that has not been given it
start_limited() {
  /usr/bin/setpriv --bounding-set=-ipc_lock --inh-caps=-ipc_lock sh -c "ulimit -l 64; exec pcibackd $PCIBACKD_FLAGS" >>$LOG 2>&1 &
  echo $! >$STATE/pid
  wait_for 20 backend_is_ready
}
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
start_with() { PCIBACKD_FLAGS="$PCIBACKD_FLAGS $*" start_backend; }
pins_memory() { grep -q "VmLck:.*[1-9]" "/proc/$(cat $STATE/pid)/status"; }

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
  must "one starts whose guests may map registers" start_with --map-bars
  must "the device is hidden, with its group" pciback hide --group $BEHIND_BRIDGE
  must "a guest gets it" new_guest one $BEHIND_BRIDGE
  drive one edu last >$STATE/last 2>&1 &
  must "and maps its registers" wait_for 10 grep using $STATE/last
  must "its process hangs" hang
  check "the guest ends all the same" end_guest one
  check "the device is nobody's" wait_for 20 hidden $BEHIND_BRIDGE
  check "no other guest gets it as long as it is mapped" refused "attaching" new_guest two $BEHIND_BRIDGE
  check "the log says why, and the remedy" grep "fuser -v /dev/vfio" $LOG
  check "it can be looked at as little, and that says so" refused "fuser" pciback show $BEHIND_BRIDGE
  check "nor can it be reset" refused "fuser" pciback reset $BEHIND_BRIDGE
  check "nor given back to the host" refused "fuser" pciback unhide --group $BEHIND_BRIDGE
  check "it is hidden, and not dead" hidden $BEHIND_BRIDGE
  must "the process ends" end_hanging
  check "the device can be reset with its bus, closed as it is" has "reset" pciback reset --method bus $BEHIND_BRIDGE
  check "and looked at" has "Vendor ID" pciback show $BEHIND_BRIDGE
  must "another guest gets it" new_guest three $BEHIND_BRIDGE
  check "and can use it" drive three edu identify
  check "that guest ends" end_guest three
  check "and the device is given back" pciback unhide --group $BEHIND_BRIDGE
  must "the backend stops once more" stop_backend
  must "one starts whose guests may give nothing" start_with --guest-memory 0
  check "a device is hidden" pciback hide $EDU
  must "a guest has it" new_guest two $EDU
  check "and cannot give it memory" refused "giving memory for DMA" drive two edu identify
  check "the log tells what it may give, and the remedy" grep "may give 0 in all.*--guest-memory" $LOG
  check "the guest ends" end_guest two
  check "and the device is given back" pciback unhide $EDU
  must "the backend stops a last time" stop_backend
  must "one starts whose guests may give 1 MiB, all together" start_with --all-guests-memory 1
  check "a device is hidden" pciback hide $EDU
  check "and another one" pciback hide $OTHER_EDU
  must "a guest has it" new_guest one $EDU
  drive one edu last >$STATE/last 2>&1 &
  must "and has given 1 MiB" wait_for 10 grep using $STATE/last
  must "another guest has the other one" new_guest two $OTHER_EDU
  check "and cannot give any" refused "giving memory for DMA" drive two edu identify
  check "the log tells how much they may give, and the remedy" grep "domain $(domid two).*have given 1048576 bytes.*--all-guests-memory" $LOG
  check "the first one ends" end_guest one
  check "then the other one can" drive two edu identify dma
  check "it ends, too" end_guest two
  check "the device is given back" pciback unhide $EDU
  check "and the other one" pciback unhide $OTHER_EDU
  must "the backend stops once more" stop_backend
  must "one starts whose guests may give half of the host's memory" start_backend
  check "a device is hidden" pciback hide $EDU
  check "and another one" pciback hide $OTHER_EDU
  must "a guest is made" new_guest one
  must "and gives 1 GiB, though it has no device" lab-guest give $RUN_DIR "$(domid one)" 1024
  { toolstack attach "$(domid one)" $EDU; echo "$?" >$STATE/attached; } &
  must "it gets one, and its memory is pinned" wait_for 10 pins_memory
  must "meanwhile another guest gets the other one" new_guest two $OTHER_EDU
  check "before the first one has its own" [ ! -e $STATE/attached ]
  check "the first one has it in the end" wait_for 60 grep 0 $STATE/attached
  check "and can use it" drive one edu identify dma
  check "as the other guest can use its own" drive two edu identify dma
  check "the first one ends" end_guest one
  check "the other one, too" end_guest two
}
