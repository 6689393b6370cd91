# a write that was dropped is told of, let through as suggested and no further, until the guest gives its device back
TIMEOUT=400
CONFIG=/run/policy.toml
CARD=0000:00:05.0
# Where QEMU's e1000e has the uncorrectable error mask of its AER capability. Its Device Control has no bits that can be written.
aer_mask=0x108
story() {
  PCIBACKD_FLAGS="$PCIBACKD_FLAGS --config $CONFIG"
  printf '[[device]]\nid = "8086:10d3"\nbdf = "%s"\nreset = "flr"\n[[device]]\nid = "ffff:0001"\n' $CARD >$CONFIG
  check "the configuration can be used" has "can be used" pcibackd --check-config $CONFIG
  check "what no device matches is told with its line" has "line 5" sh -c "pcibackd --check-config $CONFIG 2>&1"
  must "the backend starts" start_backend
  check "xl takes the card" xl pci-assignable-add 00:05.0
  check "pciback tells its path" has "path $CARD" pciback show 00:05.0
  check "and what is set for it, and why" has "[[device]], line 1" pciback set 00:05.0
  must "a guest starts with it" create_guest pv 'pci=["00:05.0"]'
  before=$(setpci -s $CARD ECAP_AER+8.l)
  wanted=$(flip "$before" 10)
  severity=$(setpci -s $CARD ECAP_AER+c.l)

  check "the guest writes a mask of AER" writes pv ECAP_AER+8.l "$wanted"
  check "which does not reach the card" reads ECAP_AER+8.l "$before"
  check "pciback says which registers were missed" missed
  range=$(pciback show $CARD --dropped --json | sed -n 's/.*permissive+=\([^"]*\)".*/\1/p')
  check "pciback set takes what it suggests" has "set at run time" pciback set 00:05.0 "permissive+=$range"
  check "the guest writes again" writes pv ECAP_AER+8.l "$wanted"
  check "and the card has it" reads ECAP_AER+8.l "$wanted"
  check "it writes the register behind it as well" writes pv ECAP_AER+c.l "$(flip "$severity" 10)"
  check "which was not asked for, and stays closed" reads ECAP_AER+c.l "$severity"
  check "though it can be written" dom0_can_write_it

  echo 'permisive = true' >>$CONFIG
  kill -HUP "$(cat $STATE/pid)"
  check "a typo in the file is told of with its line" wait_for 10 grep -q 'line 7' $LOG
  check "the guest is served on" writes pv ECAP_AER+8.l "$before"
  check "as it was" reads ECAP_AER+8.l "$before"
  sed -i 's/^permisive = true/reset = "auto"/; s/ffff:0001/8086:10d3/' $CONFIG
  kill -HUP "$(cat $STATE/pid)"
  check "a file without one holds at once" wait_for 10 has "[[device]], line 5" pciback set 00:05.0

  check "the guest is destroyed" destroy pv
  check "what was set goes with it" wait_for 20 lacks "run time" pciback set 00:05.0
  must "another one starts" create_guest pv 'pci=["00:05.0"]'
  before=$(setpci -s $CARD ECAP_AER+8.l)
  check "it writes the mask" writes pv ECAP_AER+8.l "$(flip "$before" 30)"
  check "which does not reach the card" reads ECAP_AER+8.l "$before"

  offset=$(printf %x $aer_mask)
  check "a quirk opens a bit of it, in the kernel's syntax" quirk "$CARD-$offset:4:00000010"
  check "and is listed in the kernel's" has "00000$offset:4:00000010" cat /sys/bus/pci/drivers/pciback/quirks
  check "the guest writes two bits" writes pv ECAP_AER+8.l "$(flip "$before" 30)"
  check "and the card has the one" reads ECAP_AER+8.l "$(flip "$before" 10)"
  check "the guest shuts down" shut_down pv
  check "the quirk goes with it" wait_for 20 lacks ":00000010" cat /sys/bus/pci/drivers/pciback/quirks

  check "a guest's topology is set for its next start" has "set at run time" pciback set --guest pv topology=passthrough
  must "it starts" create_guest pv 'pci=["00:05.0"]'
  check "and sees the card where dom0 has it" has '00:05.0 "0200" "8086" "10d3"' guest pv lspci -mn
  check "it shuts down" shut_down pv
  check "the next one is to see it as most do" pciback set --guest pv topology=vpci
  follows
}

# hide and facade, when the file is read again
follows() {
  check "xl gives the card back" wait_for 20 xl pci-assignable-remove 00:05.0
  reads_again '1i facade = "off"'
  check "a facade that is not wanted any more is taken away" wait_for 10 not [ -e /sys/bus/pci/drivers/pciback ]
  reads_again 's/^facade = .*/hide = ["00:05.0"]/'
  check "one that is wanted is laid" wait_for 10 [ -e /sys/bus/pci/drivers/pciback/slots ]
  check "what hide names newly is hidden" wait_for 20 has 0000:00:05.0 xl pci-assignable-list
  reads_again '/^hide = /d'
  check "what it does not name any more is told of" wait_for 10 grep -q "hide does not name $CARD any more" $LOG
  check "and stays hidden" has 0000:00:05.0 xl pci-assignable-list
}

# Changes the file by sed, and has the daemon read it again
reads_again() {
  sed -i "$1" $CONFIG
  kill -HUP "$(cat $STATE/pid)"
}

# A value with the bits of a mask turned over, both hexadecimal
flip() { printf "%0${#1}x" $((0x$1 ^ 0x$2)); }

writes() { guest "$1" setpci -s 00:00.0 "$2=$3"; }
reads() { [ "$(setpci -s $CARD "$1")" = "$2" ] || { setpci -s $CARD "$1"; return 1; }; }
quirk() { echo "$1" >/sys/bus/pci/drivers/pciback/quirks; }

# Device Control, which Linux writes when it finds the card, by its name; the mask by its offset
missed() {
  pciback show $CARD --dropped >$STATE/dropped
  for expected in 'PCI Express, Device Control' "^$(printf '0x%03x' $aer_mask)  *4 "; do
    grep "$expected" $STATE/dropped || { cat $STATE/dropped; return 1; }
  done
}

dom0_can_write_it() {
  setpci -s $CARD "ECAP_AER+c.l=$(flip "$severity" 10)"
  reads ECAP_AER+c.l "$(flip "$severity" 10)"
  local result=$?
  setpci -s $CARD "ECAP_AER+c.l=$severity"
  return $result
}
