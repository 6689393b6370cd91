# guests reach I/O ports of their devices through VFIO, by every width that ports have; nobody reaches another's, or ports of the host
MACHINE=linux
DEVICES="-netdev user,id=net7 -device rtl8139,bus=pcie.0,addr=7,netdev=net7,mac=52:54:00:00:00:07,romfile="
CARD=0000:01:00.0
OLD=0000:00:07.0
story() {
  local ports others
  ports=$(resource $CARD 2)
  others=$(resource $OLD 0)
  must "a card is bound to vfio-pci by hand" bind_vfio $CARD
  check "a program without pcibackd reaches registers through its ports" drive vfio:$CARD igb ports
  must "it is given back" unbind_vfio $CARD
  must "the backend starts" start_backend
  must "it is hidden, and a card of old" eval 'pciback hide $CARD && pciback hide $OLD'
  must "a guest has one" new_guest one $CARD
  must "another guest has the other" new_guest two $OLD
  check "the guest reaches registers through ports, as in memory" drive one igb identify ports
  check "the other one does, by bytes, words and double words" drive two rtl8139 ports
  check "asleep, the card answers neither at ports nor in memory" drive one igb asleep
  check "ports have no accesses of 8 bytes" refused "Invalid argument" look one io "$ports" 8
  check "ports of another guest's device are refused" refused "Operation not permitted" look one io "$others" 1
  check "ports of the host are" refused "Operation not permitted" look one io 0xcf8 4
  check "ports are no memory" refused "Operation not permitted" look one memory "$ports" 4
  check "and memory no ports" refused "Operation not permitted" look one io "$(resource $CARD 0)" 4
  drive one igb last >$STATE/last 2>&1 &
  must "the guest uses its ports" wait_for 10 grep using $STATE/last
  check "it ends meanwhile" end_guest one
  check "and its driver has lost them" wait_for 10 grep gone $STATE/last
  must "the next guest gets the card" new_guest three $CARD
  check "and reaches its ports" drive three igb ports
  check "the other guest still reaches its own" drive two rtl8139 ports
}
