# devices come to a running guest and go, twenty times, while another device of it carries traffic; nothing is left of them
TIMEOUT=600
story() {
  local turn device
  must "the backend starts" start_backend
  for device in 00:05.0 01:00.0 00:06.0 00:08.0; do check "xl takes $device" xl pci-assignable-add $device; done
  must "a guest starts without a device" create_guest pv 'passthrough="enabled"; e820_host=1'
  must "nobody works on a device" wait_for 10 at_rest
  what_is_held >$STATE/none

  check "a card comes, its first" attach 00:05.0
  check "its driver brings it up" guest pv nic_up e1000e
  must "it carries traffic" guest pv start_ping
  must "another comes and goes" come_and_go
  must "nobody works on a device any more" wait_for 10 at_rest
  what_is_held >$STATE/one
  for turn in $(seq 20); do must "and again, $turn" come_and_go; done
  check "as much is held as after the first time" wait_for 10 holds_as_much_as one
  check "no ping was lost meanwhile" has ' 0% packet loss' guest pv end_ping

  check "three devices come" attach 01:00.0 00:06.0 00:08.0
  check "the guest has all of them" guest_has '10d3 10d3 8139 0010'
  check "the one in the middle goes, and xl renumbers" detach 00:06.0
  check "the guest has the others" guest_has '10d3 10d3 0010'
  check "the first goes" detach 00:05.0
  check "it comes again, behind the others" attach 00:05.0
  check "the guest has three" guest_has '10d3 10d3 0010'
  check "one drives a disk" guest pv 'modprobe nvme && sum_of /dev/nvme0n1'
  check "all go" detach 01:00.0 00:08.0 00:05.0
  check "the guest has none" guest_has ''
  check "nor a backend" nothing_left
  check "and nobody holds anything for it" wait_for 10 holds_as_much_as none
  check "a card comes again" attach 01:00.0
  check "and works" guest pv 'nic_up && ping -c 3 -A -W 5 10.0.2.2'
  check "the guest shuts down" shut_down pv
}

# A device comes, its driver takes it with MSI-X, and it goes
come_and_go() {
  attach 01:00.0 &&
    guest pv 'wait_until [ -e /sys/bus/pci/devices/0000:00:01.0/net ]' &&
    detach 01:00.0 &&
    guest pv '[ ! -e /sys/bus/pci/devices/0000:00:01.0 ]'
}

attach() { for device in "$@"; do no_wait xl pci-attach pv $device || return; done; }
detach() { for device in "$@"; do no_wait xl pci-detach pv $device || return; done; }

# guest_has 'ID ...': these devices, in the order of their addresses
guest_has() { has "<$1>" guest pv "wait_until has_devices '$1'; echo \"<\$(device_ids)>\""; }

# What the daemon has open and Xen has granted because of the guest's devices: files, threads, pages that are mapped, interrupts
what_is_held() {
  local process
  if [ -e $STATE/pid ]; then
    process=/proc/$(cat $STATE/pid)
    set -- $process/fd/*
    echo "files: $#"
    echo "threads: $(threads | sort | tr '\n' ',')"
  fi
  echo "grants in use: $(xen_says g | grep -c '^(XEN) \[0x')"
  xen_says q | sed -n "/Rangesets belonging to domain $(xl domid pv):/,/Memory/s/.*Interrupts/interrupts/p"
}

# The names of its threads. Those of the facade's pool, which last for some seconds after xl was there, have nothing to do with devices.
threads() { cat "/proc/$(cat $STATE/pid)/task/"*/comm | grep -v '^facade-pool$'; }

# A device that was taken away is reset by a thread with its name
at_rest() { [ $BACKEND = stock ] || ! threads | grep ' 0000:'; }

holds_as_much_as() { what_is_held >$STATE/now; diff $STATE/$1 $STATE/now; }

# What Xen prints for a debug key
xen_says() { xl dmesg -c >/dev/null; xl debug-keys $1; xl dmesg; }
