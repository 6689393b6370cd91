# a guest that runs no frontend, not yet or not any more: nobody waits for it; and however soon its driver is loaded again, it has its devices
TIMEOUT=400
story() {
  must "the backend starts" start_backend
  check "xl takes a card" xl pci-assignable-add 00:05.0
  check "and another" xl pci-assignable-add 01:00.0
  must "a guest starts that runs no frontend" create_guest pv "$(devices 00:05.0 01:00.0)" "extra=\"$GUEST_KERNEL nopcifront\""
  ends_at_once
  must "a guest starts" create_guest pv "$(devices 00:05.0 01:00.0)"
  check "it pings" guest pv 'nic_up e1000e && ping -c 3 -A -W 5 10.0.2.2'
  check "it unloads xen-pcifront" guest pv unload_pcifront
  check "it has no devices then" guest pv 'has_devices ""'
  check "a device comes and goes at once all the same" detach_and_attach 01:00.0
  check "it loads xen-pcifront again" guest pv modprobe xen-pcifront
  check "it pings as before" guest pv 'nic_up && ping -c 3 -A -W 5 10.0.2.2'
  check "with both devices" guest pv 'has_devices "10d3 10d3"'
  check "it unloads and loads it without a pause" guest pv reload_pcifront 3
  check "it unbinds and binds it without a pause" guest pv rebind_pcifront 3
  check "it pings as before, again" guest pv 'nic_up && ping -c 3 -A -W 5 10.0.2.2'
  check "with both devices, again" guest pv 'has_devices "10d3 10d3"'
  check "it unloads xen-pcifront once more" guest pv unload_pcifront
  ends_at_once
}

ends_at_once() {
  local begin
  begin=$(hundredths)
  check "it is destroyed at once" no_wait destroy pv
  echo "VALUE destroy_without_frontend $(seconds $(($(hundredths) - begin))) s"
  check "nothing is left of it" wait_for 5 nothing_left
}

detach_and_attach() { no_wait xl pci-detach pv $1 && no_wait xl pci-attach pv $1; }
