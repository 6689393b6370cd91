# a guest has two devices of different groups, which do DMA to the same memory; one is taken from it meanwhile, and given to it again
MACHINE=linux
EDU=0000:00:05.0
NVME=0000:00:08.0
says() { [ "$(grep -c "$1" $STATE/both)" = "$2" ]; }
told() { wait_for 30 says "$1" "$2" || { cat $STATE/both; return 1; }; }
# How many MSI-X vectors the disk has, how many of them the kernel has reserved, and how many it listens to
vectors() { lspci -vv -s $NVME | sed -n 's/.*MSI-X:.*Count=\([0-9]*\) .*/\1/p'; }
reserved_vectors() { find /sys/bus/pci/devices/$NVME/msi_irqs -type f 2>/dev/null | wc -l; }
wired_vectors() { grep -c "vfio-msix\[[0-9]*\]($NVME)" /proc/interrupts; }
story() {
  must "the backend starts" start_backend
  must "two devices are hidden" eval 'pciback hide $EDU && pciback hide $NVME'
  check "they are in different groups" [ "$(group_of $EDU)" != "$(group_of $NVME)" ]
  must "a guest has both" new_guest one $EDU $NVME
  { drive one both work lose find work && echo ended; } >$STATE/both 2>&1 &
  must "each takes over what the other has put into memory, and both interrupt" told "both work" 1
  check "the disk has more vectors than it uses" [ "$(vectors)" -gt 2 ]
  check "all of which are reserved" [ "$(reserved_vectors)" = "$(vectors)" ]
  check "and those that it uses are wired" [ "$(wired_vectors)" = 2 ]
  check "edu is taken from the guest" toolstack detach "$(domid one)" $EDU
  check "it is nobody's" wait_for 10 hidden $EDU
  check "the disk reads and writes the guest's memory still" told "the disk works alone" 1
  check "the guest gets edu again" toolstack attach "$(domid one)" $EDU
  check "which reaches the memory that was given before it came" told "both work" 2
  check "and both drivers end" told ended 1
  check "the disk's vectors are no more" [ "$(reserved_vectors)" = 0 ]
  check "no DMA of edu was stopped" lacks "has stopped" pciback show $EDU
  check "nor of the disk" lacks "has stopped" pciback show $NVME
  check "the guest ends" end_guest one
  check "both go back" eval 'pciback unhide $EDU && pciback unhide $NVME'
  check "the disk to its driver" wait_for 10 driven_by nvme $NVME
  check "edu to none, as before" not driven_by vfio-pci $EDU
}
