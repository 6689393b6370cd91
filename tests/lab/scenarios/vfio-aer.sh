# errors that a guest's device reports through VFIO: its guest recovers from them, or is destroyed; another guest hears nothing of it
MACHINE=linux
CARD=0000:01:00.0
EDU=0000:00:05.0
BELOW=0000:04:00.0
story() {
  must "errors can be injected" modprobe aer_inject
  configure
  must "the backend starts" start_backend
  must "a card behind a root port is hidden, and an edu" eval 'pciback hide $CARD && pciback hide $EDU'
  must "a guest has the card" new_guest one $CARD
  must "another guest has edu" new_guest two $EDU
  check "the card interrupts by each vector" drive one igb identify msix

  check "it reports an error that it has corrected" report_correctable
  check "which is counted" wait_for 10 has '1 correctable' pciback show $CARD
  check "and nothing else comes of it" lacks 'has reported' cat $LOG

  drive one igb recover >$STATE/recovery1 2>&1 &
  must "the guest waits for errors" wait_for 10 grep waiting $STATE/recovery1
  check "the card reports a non-fatal error" report_non_fatal
  check "the guest recovers, and has its interrupts" wait_for 20 recovered 1
  check "it has asked for a reset" has 'was reset for its guest' cat $LOG
  check "it was asked for these steps" steps 1 'error detected,slot reset,resume'
  check "the other guest can use its device" drive two edu identify dma intx msi

  drive one igb recover >$STATE/recovery2 2>&1 &
  must "the guest waits again" wait_for 10 grep waiting $STATE/recovery2
  check "the card reports a fatal error, and the kernel resets the link" report_fatal
  check "the guest recovers, and has its interrupts" wait_for 30 recovered 2
  check "it was asked for these steps" steps 2 'error detected,slot reset,resume'
  check "and can use the card from the start" drive one igb identify msix
  check "the other guest can use its device" drive two edu identify dma intx msi
  check "the log says so of both" [ "$(grep -c 'has recovered from its error' $LOG)" = 2 ]
  check "each error was told once" [ "$(grep -c 'has reported a .*fatal error' $LOG)" = 2 ]
  check "pciback show tells of both" has '1 non-fatal, 1 fatal; the last one: recovered' pciback show $CARD

  must "an edu behind a root port is hidden" pciback hide $BELOW
  must "a guest has it" new_guest four $BELOW
  drive four edu recover >$STATE/recovery3 2>&1 &
  must "and waits for errors with MSI on" wait_for 10 grep waiting $STATE/recovery3
  check "its port reports a fatal error, and the kernel resets the link" report_fatal_above
  check "the guest recovers, and has MSI" wait_for 30 recovered 3
  check "the other guest has heard nothing" drive two edu identify msi

  drive one igb deaf >$STATE/deaf 2>&1 &
  must "the guest handles errors no more" wait_for 10 grep waiting $STATE/deaf
  check "the card reports an error" report_non_fatal
  check "in time, it is given up, and the guest destroyed" wait_for 20 hidden $CARD
  check "the log says so" grep 'did not answer in time.*the guest is destroyed' $LOG
  rm $STATE/one.domid
  wait $!
  check "the other guest can use its device still" drive two edu identify dma intx msi
  check "a card that nobody has reports a fatal error" report_fatal
  must "the next guest gets it" wait_for 20 new_guest three $CARD
  check "and can use it" drive three igb identify msix
  check "all guests end" eval 'end_guest two && end_guest three && end_guest four'
  must "the backend stops" stop_backend

  must "one starts that has neither the kernel's trace nor its counters" start_with_vfio_alone
  check "and says that there is no trace" wait_for 5 grep "errors of devices are looked for in their counters" $LOG
  must "the card is hidden" pciback hide $CARD
  must "a guest has it" new_guest five $CARD
  drive five igb recover >$STATE/recovery4 2>&1 &
  must "and waits for errors" wait_for 10 grep waiting $STATE/recovery4
  check "the card reports a non-fatal error" report_non_fatal
  check "VFIO tells of it: the guest recovers, and has its interrupts" wait_for 20 recovered 4
  check "it was asked for these steps" steps 4 'error detected,slot reset,resume'
}

# The trace is not to be had, since a file is in its way, and the counter is empty
start_with_vfio_alone() {
  unshare -m sh -c "mount --make-rprivate / 2>/dev/null; mount -t tmpfs none /sys/kernel/tracing && : >/sys/kernel/tracing/instances &&
    mount --bind /dev/null /sys/bus/pci/devices/$CARD/aer_dev_nonfatal && exec pcibackd $PCIBACKD_FLAGS" >>$LOG 2>&1 &
  echo $! >$STATE/pid
  wait_for 20 backend_is_ready
}

configure() {
  mkdir -p /etc/pciback
  cat >/etc/pciback/pcibackd.toml <<END
[defaults]
aer = { on_failure = "kill", timeout = 3 }
[commands]
kill = ["lab-guest", "toolstack", "$RUN_DIR", "destroy", "{domain}"]
END
}

# inject DEVICE ERRORS: bus, device, function; uncorrectable and correctable status. As in pv-aer
inject() { printf '%b\000%b\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000' "$1" "$2" >/dev/aer_inject; }
report_non_fatal() { inject '\0001\0000\0000' '\0000\0100\0000\0000\0000\0000\0000\0000'; }
report_fatal() { inject '\0001\0000\0000' '\0020\0000\0000\0000\0000\0000\0000\0000'; }
report_fatal_above() { inject '\0000\0014\0000' '\0020\0000\0000\0000\0000\0000\0000\0000'; }
# A bad TLP
report_correctable() { inject '\0001\0000\0000' '\0000\0000\0000\0000\0100\0000\0000\0000'; }

# recovered NUMBER, steps NUMBER LIST: what a driver has done that waited for errors
recovered() { has recovered cat $STATE/recovery$1; }
steps() { has "waiting,$2," eval "tr '\n' , <$STATE/recovery$1"; }
