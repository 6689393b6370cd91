# lines of devices on VFIO: none of one that is to have none; two on one line in the host, told apart by the kernel, or not; served without pcibackd
MACHINE=linux
EDU=0000:00:05.0
OTHER=0000:05:00.0
story() {
  no_line
  must "the backend starts" start_backend
  must "two devices are hidden" both hide
  must "a guest has one that is to have no line" new_guest one $EDU
  check "it sees no pin" drive one function nopin
  check "nobody listens to a line of it" not listens $EDU
  check "its messages arrive" drive one edu identify msi
  check "the guest ends" end_guest one

  rm /etc/pciback/pcibackd.toml
  must "it may have its line" reload
  must "the guest has it again" new_guest one $EDU
  must "another guest has one on the same line" new_guest two $OTHER
  check "the kernel listens for both" eval 'listens $EDU && listens $OTHER'
  check "on one line of the host" eval 'grep "vfio-intx($EDU)" /proc/interrupts | grep "vfio-intx($OTHER)"'
  { drive one edu intx intx intx && echo served; } >$STATE/intx 2>&1 &
  check "one interrupts" drive two edu intx intx intx
  check "and the other one meanwhile" wait_for 20 has served cat $STATE/intx
  check "one serves it by an eventfd, while the other one has interrupts" drive one edu endevent
  check "both ways in turn" drive one edu intx endevent intx
  lab-guest drive edu "$RUN_DIR:$(domid one)" endless >$STATE/endless 2>&1 &
  check "one says that it has served it, again and again" wait_for 20 has "at it" cat $STATE/endless
  check "the other one does not notice" drive two edu intx endevent
  check "the device is taken from it" end_guest one
  must "and another guest has it" new_guest three $EDU
  check "which is not interrupted before it has served its line" drive three edu intx endevent intx
  check "though the former guest is still at it" eval 'kill -0 $! && kill $!'
  check "both end" eval 'end_guest three && end_guest two'
  must "both are given back" both unhide

  must "the kernel is not to tell devices apart" eval 'rmmod vfio-pci && modprobe vfio-pci nointxmask=1'
  must "both are hidden again" both hide
  must "a guest has one" new_guest one $EDU
  must "another guest has the other" new_guest two $OTHER
  check "one has the line" drive one edu intx
  check "the log says that the other one has none" grep "$OTHER: its guest has no interrupts by its INTx line" $LOG
  check "which has messages" drive two edu identify msi
  check "and the log does not go on about it" [ "$(grep -c "$OTHER: its guest has no interrupts" $LOG)" -le 3 ]
  check "both end" eval 'end_guest one && end_guest two'
  no_line
  must "one is to have no line again" reload
  must "a guest has the other" new_guest two $OTHER
  must "a guest has the one without" new_guest one $EDU
  check "the line of which was not even tried" not grep "$EDU: its guest has no interrupts by its INTx line" $LOG
  check "the other one has it" drive two edu intx
  check "both end" eval 'end_guest one && end_guest two'
  must "both are given back" both unhide
  rm /etc/pciback/pcibackd.toml
  check "the kernel is as before" eval 'rmmod vfio-pci && modprobe vfio-pci nointxmask=0'
}

both() { pciback "$1" $EDU && pciback "$1" $OTHER; }
listens() { grep -q "vfio-intx($1)" /proc/interrupts; }
no_line() {
  mkdir -p /etc/pciback
  printf '[[device]]\nbdf = "%s"\nintx = "off"\n' $EDU >/etc/pciback/pcibackd.toml
}
reload() {
  local before
  before=$(times_read)
  kill -HUP "$(cat $STATE/pid)" && wait_for 10 is_read_again "$before"
}
times_read() { grep -c 'configuration was read again' $LOG; }
is_read_again() { [ "$(times_read)" -gt "$1" ]; }
