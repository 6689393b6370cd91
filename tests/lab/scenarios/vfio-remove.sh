# A device is pulled out while it is hidden, and while a guest uses it: everybody lets go of it, and nothing hangs
MACHINE=linux
EDU=0000:04:00.0
hidden() { pciback list | grep "^$1 " | grep -q hidden; }
there() { [ -e /sys/bus/pci/devices/$EDU ]; }
# As the button of its slot does
pulled_out() { echo 0 >/sys/bus/pci/slots/12/power; }
put_in() { echo 1 >/sys/bus/pci/slots/12/power && wait_for 10 there; }

story() {
  must "pcibackd runs on the embedded Xen with the machine's devices" start_backend
  check "a device is hidden" pciback hide $EDU
  check "it is pulled out" pulled_out
  check "and is gone from the machine" not there
  check "pcibackd has forgotten it" wait_for 5 not hidden $EDU
  check "it is put in again" put_in
  check "and hidden again" pciback hide $EDU
  check "somebody unbinds it by hand" wait_for 5 unbound_by_hand
  check "pcibackd lets go of it, too" wait_for 5 not hidden $EDU
  check "and it can be hidden again" pciback hide $EDU
}

unbound_by_hand() { echo $EDU >/sys/bus/pci/drivers/vfio-pci/unbind; }
