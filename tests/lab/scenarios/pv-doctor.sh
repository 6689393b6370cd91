# the doctor: what is wrong is told, and what to do; resets are tried; an interrupt line that dom0 uses is kept from a guest
story() {
  check "without a daemon it says so" finds daemon problem
  check "the kernel's backend could be loaded, which it says" finds xen-pciback warning
  mkdir -p /etc/modprobe.d /etc/pciback
  printf 'blacklist xen-pciback\ninstall xen-pciback /bin/false\n' >/etc/modprobe.d/pcibackd.conf
  printf '[[device]]\nbdf = "00:05.0"\nreset = "pm"\n' >/etc/pciback/pcibackd.toml
  must "the backend starts" start_backend
  check "nothing is wrong with this host" healthy

  methods=$(methods_of 02:00.0)
  check "xl takes a card that can be reset in several ways" xl pci-assignable-add 02:00.0
  check "nothing is wrong with it" pciback doctor 02:00.0
  check "it tries each of them: $methods" resets_are_tried 02:00.0
  check "the card can be reset by hand" has 'can be given to a guest' pciback reset 02:00.0
  check "in the way that is wanted" has 'can be given to a guest' pciback reset --method pm 02:00.0
  check "the kernel has all of the ways as before" [ "$(methods_of 02:00.0)" = "$methods" ]

  # Two cards on one line. In dom0 the driver is told to use it, and not MSI.
  rmmod e1000e 2>/dev/null
  modprobe e1000e IntMode=0,0
  check "xl takes a card whose line another one in dom0 uses" xl pci-assignable-add 00:05.0
  check "the doctor says who" has "0000:01:00.0 (dom0's e1000e)" pciback doctor 00:05.0
  check "a reset that it does not have is refused, with those that it has" refused_with 'the kernel offers pm' pciback reset --method flr 00:05.0
  must "a guest starts with it" create_guest pv 'pci=["00:05.0"]'
  check "the card has neither line nor pin there" has 0000 guest pv setpci -s 00:00.0 INTERRUPT_LINE.w
  check "and cannot raise it, whatever the guest writes" intx_stays_off 00:05.0
  check "it pings by MSI-X" guest pv 'nic_up e1000e && ping -c 3 -A -W 5 10.0.2.2'
  check "dom0's own card on that line works" dom0_pings 0000:01:00.0
  check "without MSI-X the guest's card still cannot raise the line" off_without_msi 00:05.0
  check "who has the card is told" has "domain $(xl domid pv), which sees it as 0000:00:00.0" pciback doctor 00:05.0
  check "and it is not to be reset now" refused_with 'in use by domain' pciback reset 00:05.0
  kill_backend
  check "who has it is told when the daemon is dead, too" holder_is_told_offline
  check "it starts again" start_backend
  check "the guest shuts down" shut_down pv
  check "the line's other user leaves" rmmod e1000e
  check "now the line is for the card alone" has 'for itself' pciback doctor 00:05.0
  rm /etc/modprobe.d/pcibackd.conf
}

# finds CHECK VERDICT: among what the doctor says of the host
finds() { pciback doctor | grep "^  $1  *$2 " || { pciback doctor; return 1; }; }

# Every question about the host is answered, and well
healthy() {
  pciback doctor >/tmp/doctor || { cat /tmp/doctor; return 1; }
  for name in daemon Xen xenstore IOMMU 'interrupt remapping' lockdown xen-pciback FUSE facade; do
    grep "^  $name  *ok " /tmp/doctor || { cat /tmp/doctor; return 1; }
  done
}

methods_of() { cat "/sys/bus/pci/devices/0000:$1/reset_method"; }

# The kernel gives up a reset of the emulated port's bus, as the port does not say that its link is up again: the doctor has to find that out
resets_are_tried() {
  pciback doctor --try-resets "$1" >/tmp/doctor && { echo "no problem found"; return 1; }
  for expected in 'flr  *ok ' 'pm  *ok ' 'bus  *problem '; do
    grep "^  reset by $expected" /tmp/doctor || { cat /tmp/doctor; return 1; }
  done
}

# refused_with TEXT COMMAND...: it fails, and says why
refused_with() {
  local text="$1" output
  shift
  output=$("$@" 2>&1) && { echo "done: $output"; return 1; }
  case "$output" in *"$text"*) ;; *) echo "no '$text' in: $output"; return 1 ;; esac
}

# Bit 10 of the command register: INTx disable
intx_is_off() { [ $((0x$(setpci -s "$1" COMMAND) & 0x400)) != 0 ]; }
intx_stays_off() { intx_is_off "$1" && guest pv setpci -s 00:00.0 COMMAND=0007 && intx_is_off "$1"; }
off_without_msi() { guest pv rmmod e1000e && intx_is_off "$1"; }

holder_is_told_offline() {
  pciback doctor 00:05.0 >/tmp/doctor && { echo "no problem found"; return 1; }
  grep "holder  *ok  *domain $(xl domid pv)," /tmp/doctor || { cat /tmp/doctor; return 1; }
}
