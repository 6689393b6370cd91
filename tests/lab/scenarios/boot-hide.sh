# a Debian dom0 with our package boots from a disk: devices that are hidden at boot are never dom0's, and systemd keeps pcibackd up
ALONE=yes
DISK=yes
TIMEOUT=400
PREPARE="dpkg -i /pcibackd.deb && pciback hide --persist --next-boot 00:05.0"
KERNEL="xen-pciback.hide=(0000:00:06.*)(00:07)(00:08.0)"
story() {
  check "the initramfs has reserved the card of the configuration" reserved 0000:00:05.0
  check "and those of the kernel's command line" reserved 0000:00:06.0
  check "behind its typo, too" reserved 0000:00:08.0
  check "which is told of on the console" has '(00:07) names no device' dmesg
  check "the driver is there for another card" driven_by e1000e 0000:01:00.0
  check "and never had this one" lacks '0000:00:05.0: ' dmesg_of e1000e

  check "pcibackd is up by systemd" has active systemctl is-active pcibackd
  check "xl lists the first" has 0000:00:05.0 xl pci-assignable-list
  check "and the others" has 0000:00:06.0 xl pci-assignable-list
  check "the disk, too" has 0000:00:08.0 xl pci-assignable-list
  check "the kernel's pciback is not loaded" [ ! -e /sys/module/xen_pciback ]
  check "and does not come by its alias" lacks xen_pciback modprobe_alias
  check "no unit has failed" no_unit_failed

  check "killed, it is brought back by systemd" killed_it_comes_back
  check "and xl finds the devices" has 0000:00:05.0 xl pci-assignable-list
  check "in its own directory" timeout 5 ls /sys/bus/pci/drivers/pciback/0000:00:05.0
}

reserved() { [ ! -e "/sys/bus/pci/devices/$1/driver" ] && [ "$(cat "/sys/bus/pci/devices/$1/driver_override")" = pciback ]; }
driven_by() { [ "$(driver_of "$2")" = "$1" ]; }
dmesg_of() { dmesg | grep "$1 "; }
no_unit_failed() { ! systemctl --failed --plain --no-legend | grep .; }
modprobe_alias() { modprobe xen-backend:pci; lsmod; }

killed_it_comes_back() {
  local before
  before=$(systemctl show -P MainPID pcibackd)
  systemctl kill -s KILL pcibackd
  wait_for 30 another_runs "$before" && wait_for 20 pciback status
}

another_runs() {
  local now
  now=$(systemctl show -P MainPID pcibackd)
  [ "$now" != 0 ] && [ "$now" != "$1" ]
}
