# an HVM guest has e1000e's by qemu-xen's own passthrough: the backend hides, assigns and releases them, and nobody waits for it
ALONE=yes
MACHINE=hvm
TIMEOUT=700
GUEST_TIMEOUT=300
story() {
  must "the backend starts" start_backend
  check "xl takes a card" xl pci-assignable-add 00:05.0
  check "and another" xl pci-assignable-add 00:06.0
  must "an HVM guest starts with one" create_hvm_guest hvm 'pci=["00:05.0"]'
  check "its driver brings the card up" guest hvm nic_up e1000e
  check "it pings" guest hvm ping -c 3 -A -W 5 10.0.2.2
  check "the backend shows what libxl waits for" has 4 xenstore-read "$(backend)/state"
  check "the device as exported" has 3 xenstore-read "$(backend)/state-0"
  [ $BACKEND = stock ] || check "pciback knows whose it is" has 'hvm' pciback list

  check "the other card comes" no_wait xl pci-attach hvm 00:06.0
  check "the guest sees it" guest hvm 'wait_until [ -e /sys/class/net/eth1 ]'
  [ $BACKEND = stock ] || check "it is assigned" wait_for 5 is_at 00:06.0 assigned
  begin=$(hundredths)
  check "it goes" no_wait xl pci-detach hvm 00:06.0
  echo "VALUE hvm.detach $(seconds $(($(hundredths) - begin))) s"
  check "the guest sees it no more" guest hvm '[ ! -e /sys/class/net/eth1 ]'
  [ $BACKEND = stock ] || check "it is free" wait_for 5 is_at 00:06.0 hidden
  check "the first card still pings" guest hvm ping -c 3 -A -W 5 10.0.2.2

  begin=$(hundredths)
  check "the guest is destroyed" no_wait destroy hvm
  echo "VALUE hvm.destroy $(seconds $(($(hundredths) - begin))) s"
  check "nothing is left of it" wait_for 5 nothing_left
  [ $BACKEND = stock ] || check "its card is free" wait_for 5 is_at 00:05.0 hidden
}

backend() { echo "/local/domain/0/backend/pci/$(xl domid hvm)/0"; }

is_at() { pciback list | grep "$1" | grep -w "$2"; }
