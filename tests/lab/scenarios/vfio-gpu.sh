# a guest has a graphics card through VFIO: frame buffer, mapped or not, registers and ROM, but nothing at the fixed addresses of VGA
MACHINE=linux
DEVICES="-device VGA,bus=pcie.0,addr=9"
GPU=0000:00:09.0
host_rom() { echo 1 >/sys/bus/pci/devices/$GPU/rom && cat /sys/bus/pci/devices/$GPU/rom; }
rom_is() { has "$1" eval 'drive one function rom | first_mib'; }
story() {
  local rom address
  check "it is a VGA controller" grep 0x030000 /sys/bus/pci/devices/$GPU/class
  rom=$(host_rom | first_mib)
  must "the backend starts" start_backend
  must "it is hidden" pciback hide $GPU
  must "a guest has it" new_guest one $GPU
  check "sets a mode, draws, and sees what it has drawn" drive one vga mode draw
  check "reads the expansion ROM that the host has read" rom_is "$rom"
  for address in 0xa0000 0xb8000; do
    check "it does not reach VGA's memory at $address" refused "Operation not permitted" look one memory $address 4
  done
  for address in 0x3b0 0x3c0 0x3d4; do
    check "nor VGA's ports at $address" refused "Operation not permitted" look one io $address 1
  done
  check "the guest ends" end_guest one
  must "the backend stops, and gives it back" stop_backend
  PCIBACKD_FLAGS="$PCIBACKD_FLAGS --map-bars"
  must "one starts whose guests may map registers" start_backend
  must "it is hidden again" pciback hide $GPU
  must "a guest has it" new_guest one $GPU
  check "has the frame buffer mapped, draws, and sees what it has drawn" drive one vga mapped mode draw
  check "and does not reach VGA's ports" refused "Operation not permitted" look one io 0x3c0 1
  check "the guest ends" end_guest one
}
