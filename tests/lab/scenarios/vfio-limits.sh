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

story() {
  must "the backend starts" start_backend
  must "vfio-pci is not loaded" unload
  check "no device is hidden without it, and the remedy is told" refused "modprobe vfio-pci" pciback hide $CARD
  check "the device has its driver as before" driven_by e1000 $CARD
  check "doctor says so, too" doctor_says "modprobe vfio-pci"
  must "it is loaded" modprobe vfio-pci
  check "doctor has nothing to say of the host" doctor_says "it is loaded"
  must "the backend stops" stop_backend
  must "one starts that may lock 64 KiB" start_limited
  check "a device is hidden" pciback hide $EDU
  must "a guest has it" new_guest one $EDU
  check "and cannot give it memory" refused "giving memory for DMA" drive one edu identify
  check "the log tells how much may be locked" grep "may lock 65536 bytes" $LOG
  check "and the remedy" grep "LimitMEMLOCK=infinity" $LOG
  check "the guest ends" end_guest one
  check "the device is given back" pciback unhide $EDU
}
