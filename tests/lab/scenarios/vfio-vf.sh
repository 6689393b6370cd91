# a virtual function of an igb through VFIO: identity, BARs, MSI-X, and its reset by the mailbox
MACHINE=linux
story() {
  card=$(ls /sys/bus/pci/devices/0000:01:00.0/net)
  must "the card's own driver runs" ip link set "$card" up
  must "and makes a virtual function" eval 'echo 1 >/sys/bus/pci/devices/0000:01:00.0/sriov_numvfs'
  must "which has an address" /usr/bin/ip link set "$card" vf 0 mac 52:54:00:00:00:21
  must "it is bound to vfio-pci" bind_vfio 0000:01:10.0
  check "a program without pcibackd identifies it" lab-guest drive igbvf vfio:0000:01:10.0 identify
  check "is interrupted by each vector" lab-guest drive igbvf vfio:0000:01:10.0 msix
  check "resets it, which the physical function hears of" has "address 52:54:00:00:00:21" lab-guest drive igbvf vfio:0000:01:10.0 reset
  check "the virtual function goes" eval 'echo 0 >/sys/bus/pci/devices/0000:01:00.0/sriov_numvfs'
}
