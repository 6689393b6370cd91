# a device is pulled out while a guest uses it through VFIO: the guest sees it go, nothing hangs, and another guest is served on
MACHINE=linux
EDU=0000:00:05.0
REMOVABLE=0000:05:00.0
there() { [ -e "/sys/bus/pci/devices/$1" ]; }
# As the button of its slot does
pulled_out() { echo 0 >"$(dirname "$(grep -l "^${REMOVABLE%.*}" /sys/bus/pci/slots/*/address)")/power"; }

story() {
  must "the backend starts" start_backend
  must "two devices are hidden" eval 'pciback hide $REMOVABLE && pciback hide $EDU'
  must "a guest has one" new_guest one $REMOVABLE
  must "another guest has the other" new_guest two $EDU
  drive one edu last >$STATE/last 2>&1 &
  must "the guest uses its device" wait_for 10 grep using $STATE/last
  check "it is pulled out meanwhile" no_wait pulled_out
  check "and is gone from the machine" wait_for 10 not there $REMOVABLE
  check "and forgotten" wait_for 5 not_hidden $REMOVABLE
  check "the guest has seen it go" wait_for 10 grep gone $STATE/last
  check "the other guest can use its device" drive two edu identify dma msi
  check "the guest ends" end_guest one
  check "and so does the other" end_guest two
}
