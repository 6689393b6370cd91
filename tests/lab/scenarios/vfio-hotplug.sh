# Devices that nobody has go while they are hidden: removed, unbound by hand, pulled out of their slots
MACHINE=linux
EDU=0000:00:05.0
REMOVABLE=0000:04:00.0 # for good: what is played later has to do without
there() { [ -e "/sys/bus/pci/devices/$1" ]; }
removed() { echo 1 >/sys/bus/pci/devices/$EDU/remove; }
found_again() { echo 1 >/sys/bus/pci/rescan && there $EDU; }
unbound_by_hand() { echo $EDU >/sys/bus/pci/drivers/vfio-pci/unbind; }
# As the button of its slot does
pulled_out() { echo 0 >"$(dirname "$(grep -l "^${REMOVABLE%.*}" /sys/bus/pci/slots/*/address)")/power"; }

story() {
  must "pcibackd runs on the embedded Xen with the machine's devices" start_backend
  check "a device is hidden" pciback hide $EDU
  check "it is removed" removed
  check "and is gone from the machine" not there $EDU
  check "pcibackd has forgotten it" wait_for 5 not_hidden $EDU
  check "it comes again" found_again
  check "and is hidden again" pciback hide $EDU
  check "somebody unbinds it by hand" unbound_by_hand
  check "pcibackd lets go of it, too" wait_for 5 not_hidden $EDU
  check "and it can be hidden again" pciback hide $EDU
  check "another is hidden" pciback hide $REMOVABLE
  check "and pulled out" pulled_out
  check "it is gone from the machine" wait_for 10 not there $REMOVABLE
  check "and forgotten" wait_for 5 not_hidden $REMOVABLE
}
