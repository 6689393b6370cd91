# errors that a device reports: its guest recovers from them, or loses the device or its life
TIMEOUT=400
story() {
  modprobe aer_inject
  configure detach
  must "the backend starts" start_backend
  check "it hears of errors by the tracepoint" lacks 'once a second' cat $LOG
  check "xl takes a card behind a root port" xl pci-assignable-add 01:00.0
  must "a guest starts with it" create_guest pv 'pci=["01:00.0"]'
  check "it pings" guest pv 'nic_up e1000e && ping -c 3 -A -W 5 10.0.2.2'

  check "the card reports a non-fatal error" report_non_fatal
  check "the guest recovers" wait_for 20 recoveries 1
  check "its driver had the card reset" has 'was reset for its guest' cat $LOG
  check "it pings again" guest pv 'nic_up && ping -c 3 -A -W 5 10.0.2.2'
  check "the card reports a fatal error, and dom0's kernel resets the link" report_fatal
  check "the guest recovers from that too" wait_for 20 recoveries 2
  check "and pings again" guest pv 'nic_up && ping -c 3 -A -W 5 10.0.2.2'
  check "with interrupts" guest pv 'grep -c pcifront-msi-x /proc/interrupts'
  check "pciback show tells of both" has '1 non-fatal, 1 fatal; the last one: recovered' pciback show 01:00.0
  check "the guest ends" destroy pv

  must "a guest starts that says it handles errors, and does not" create_deaf one
  check "its card reports an error" report_non_fatal
  check "in time, it is given up" wait_for 8 given_up 1
  check "the card is taken from it" wait_for 40 has 0000:01:00.0 xl pci-assignable-list
  check "the guest lives" guest one true
  check "which is destroyed" destroy one

  check "the backend is told to kill instead" restart_with kill
  must "another such guest starts" create_deaf two
  check "its card reports an error" report_fatal
  check "in time, it is given up" wait_for 12 given_up 2
  check "the guest is destroyed" wait_for 40 guest_is_gone two
  check "and the card is free" wait_for 20 has 0000:01:00.0 xl pci-assignable-list
  must "the next guest starts with it" create_guest next 'pci=["01:00.0"]'
  check "and pings" guest next 'nic_up e1000e && ping -c 3 -A -W 5 10.0.2.2'
}

configure() {
  mkdir -p /etc/pciback
  echo "[defaults]
aer = { on_failure = \"$1\", timeout = 3 }" >/etc/pciback/pcibackd.toml
}

restart_with() {
  configure $1
  kill "$(cat $STATE/pid)" && wait_for 20 backend_is_gone && start_backend
}

# struct aer_error_inj (Linux drivers/pci/pcie/aer_inject.c): bus, device, function, padding; uncorrectable and correctable status; four words of
# a header; domain. Completion timeout is non-fatal, data link protocol error is fatal, unless the device says otherwise.
inject() { printf '\001\000\000\000%b\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000' "$1" >/dev/aer_inject; }
report_non_fatal() { inject '\0000\0100\0000\0000'; }
report_fatal() { inject '\0020\0000\0000\0000'; }

recoveries() { [ "$(grep -c 'has recovered from its error' $LOG)" = $1 ]; }

# After 3 s; a fatal error's after the kernel's resets
given_up() { [ "$(grep -c 'did not answer in time' $LOG)" = $1 ]; }

create_deaf() {
  create_guest $1 'pci=["01:00.0"]' "extra=\"$GUEST_KERNEL nopcifront\"" &&
    guest $1 'modprobe xen-evtchn; modprobe xen-gntalloc; lab-guest deaf >/tmp/deaf 2>&1 & wait_until grep connected /tmp/deaf'
}
