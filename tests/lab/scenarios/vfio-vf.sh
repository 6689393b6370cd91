# a guest has a virtual function of an igb through VFIO: its identity, BARs, MSI-X, and its reset by the mailbox
MACHINE=linux
CARD=0000:01:00.0
FUNCTION=0000:01:10.0
story() {
  card=$(ls /sys/bus/pci/devices/$CARD/net)
  must "the card's own driver runs" ip link set "$card" up
  must "and makes a virtual function" eval 'echo 1 >/sys/bus/pci/devices/$CARD/sriov_numvfs'
  must "which has an address" /usr/bin/ip link set "$card" vf 0 mac 52:54:00:00:00:21
  must "the backend starts" start_backend
  must "the function is hidden" pciback hide $FUNCTION
  must "a guest has it" new_guest one $FUNCTION
  check "it has the identity that it lacks itself" drive one igbvf identify
  check "interrupts by each vector" drive one igbvf msix
  check "and is reset, which the physical function hears of" has "address 52:54:00:00:00:21" drive one igbvf reset
  check "the guest ends" end_guest one
  must "it is given back" pciback unhide $FUNCTION
  must "and bound to vfio-pci by hand" bind_vfio $FUNCTION
  check "a program without pcibackd drives it the same way" drive vfio:$FUNCTION igbvf identify msix reset
  check "the virtual function goes" eval 'echo 0 >/sys/bus/pci/devices/$CARD/sriov_numvfs'
}
