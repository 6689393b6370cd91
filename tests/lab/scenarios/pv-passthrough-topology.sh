# with the passthrough topology a guest finds its device where dom0 has it, behind the bus number of a root port; the next guest need not
story() {
  case $BACKEND in
    stock) modprobe xen-pciback passthrough=1 ;;
    *)
      mkdir -p /etc/pciback
      printf '[guest."there"]\ntopology = "passthrough"\n' >/etc/pciback/pcibackd.toml
      must "the daemon starts with a setting for the guest 'there'" start_backend ;;
  esac
  check "xl takes the card" xl pci-assignable-add 01:00.0
  must "the guest 'there' starts with it" create_guest there 'pci=["01:00.0"]'
  check "it is at 01:00.0 in there, too" has 0000:01:00.0 guest there 'ls /sys/bus/pci/devices'
  check "and works there" guest there 'nic_up e1000e && ping -c 3 -A -W 5 10.0.2.2'
  check "the guest shuts down" shut_down there
  [ $BACKEND = stock ] && return # one topology for all
  must "a guest of another name starts with it" create_guest here 'pci=["01:00.0"]'
  check "it is at 00:00.0 in there" has 0000:00:00.0 guest here 'ls /sys/bus/pci/devices'
}
