# a device is removed whose guest has its registers mapped: the kernel waits for that guest, and nobody else does
MACHINE=linux
EDU=0000:00:05.0
NVME=0000:00:08.0
there() { [ -e "/sys/bus/pci/devices/$1" ]; }
remove() { echo 1 >/sys/bus/pci/devices/$EDU/remove; echo removed; }
stays() { sleep 3; there $EDU && ! [ -s $STATE/removed ]; }
found_again() { echo 1 >/sys/bus/pci/rescan && there $EDU; }
named() { [ "$(grep -l vfio-device /proc/[0-9]*/maps)" = "/proc/$1/maps" ]; }
has_open() {
  local file
  for file in /proc/"$1"/fd/*; do
    case "$(readlink "$file")" in /dev/vfio/*) return 0 ;; esac
  done
  return 1
}

story() {
  local holder
  PCIBACKD_FLAGS="$PCIBACKD_FLAGS --map-bars"
  must "one starts whose guests may map registers" start_backend
  must "two devices are hidden" eval 'pciback hide $EDU && pciback hide $NVME'
  must "a guest has one" new_guest one $EDU
  must "another guest has the other" new_guest two $NVME
  drive one edu mapped last >$STATE/last 2>&1 &
  must "the guest uses registers that it has mapped" wait_for 10 grep using $STATE/last
  holder=$(pidof lab-guest)
  must "and hangs" kill -STOP "$holder"
  remove >$STATE/removed 2>&1 &
  check "the device is removed" wait_for 10 grep "$EDU is wanted back by the kernel" $LOG
  check "pcibackd lets go of it" wait_for 10 not_hidden $EDU
  check "and says what keeps it" wait_for 5 grep "$EDU does not leave the host .*vfio-device" $LOG
  check "which names the guest's process" named "$holder"
  check "that has nothing of /dev/vfio open" not has_open "$holder"
  check "the device stays" stays
  check "pcibackd answers" no_wait pciback list
  check "another guest's device works" drive two nvme identify write
  check "the toolstack ends the guest" end_guest one
  check "the device stays even so" stays
  must "the guest's process ends" kill -KILL "$holder"
  check "the device goes" wait_for 10 grep removed $STATE/removed
  check "from the machine, too" not there $EDU
  check "it comes again" found_again
  check "and is hidden again" pciback hide $EDU
  must "another guest gets it" new_guest three $EDU
  check "and can use it" drive three edu mapped identify dma
  check "the other guest still uses its own" drive two nvme identify write
}
