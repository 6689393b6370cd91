# a guest writes garbage into its page, floods its port and lies in xenstore: the daemon and another guest carry on, and the log stays small
story() {
  must "the backend starts" start_backend
  check "xl takes two cards" xl pci-assignable-add 00:05.0
  check "the second as well" xl pci-assignable-add 01:00.0
  must "an honest guest starts with one" create_guest good 'pci=["01:00.0"]'
  check "it pings" guest good 'nic_up e1000e && ping -c 3 -A -W 5 10.0.2.2'
  must "a hostile one starts with the other" create_guest bad 'pci=["00:05.0"]' \
    "extra=\"$GUEST_KERNEL nopcifront\""

  check "the honest guest reads" guest good start_reads 0000:00:00.0
  check "the hostile guest does its worst" guest bad 'modprobe xen-evtchn; modprobe xen-gntalloc; lab-guest misbehave 3 >/tmp/misbehave 2>&1; cat /tmp/misbehave'
  guest bad cat /tmp/misbehave
  check "and was served in between" has 'honest: answered true, value 0x10d38086' guest bad cat /tmp/misbehave
  [ $BACKEND = stock ] || check "the daemon is still the same one" backend_is_ready

  must "the honest guest's reads come to an end" reads_end good
  check "not one was wrong" has ', 0 wrong' cat $STATE/reads
  check "it still pings" guest good ping -c 3 -A -W 5 10.0.2.2
  [ $BACKEND = stock ] || check "the daemon's log is small" smaller_than 32768 $LOG
  dmesg -c >/tmp/dmesg
  check "so is dom0's kernel's" smaller_than 65536 /tmp/dmesg

  check "the hostile guest is destroyed" destroy bad
  must "the next guest starts with its card" create_guest next 'pci=["00:05.0"]'
  check "which works as ever" guest next 'nic_up e1000e && ping -c 3 -A -W 5 10.0.2.2'
}

smaller_than() { echo "$(wc -c <$2) bytes in $2"; tail -n 5 $2; [ "$(wc -c <$2)" -lt $1 ]; }
