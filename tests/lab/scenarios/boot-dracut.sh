# a Debian dom0 boots with dracut's initramfs, and devices are reserved before drivers are loaded as with Debian's own
ALONE=yes
DISK=yes
TIMEOUT=400
PREPARE="dpkg -i /pcibackd.deb && pciback hide --persist --next-boot --no-initramfs 00:05.0 && dracut --no-hostonly --drivers 'nvme ext4 e1000e 8139too' --force --regenerate-all"
KERNEL="xen-pciback.hide=(0000:00:06.*)(00:07)"
story() {
  check "dracut has made the initramfs" has 'dracut-pre-udev' journalctl -b --no-pager
  check "it has reserved the card of the configuration" reserved 0000:00:05.0
  check "before udev" has 'pciback: 0000:00:05.0 is reserved' dmesg
  check "and the one of the kernel's command line" reserved 0000:00:06.0
  check "before its typo, which is told of" has '(00:07) names no device' dmesg
  check "the driver is there for another card" driven_by e1000e 0000:01:00.0
  check "and never had this one" lacks '0000:00:05.0: ' dmesg_of e1000e
  must "xl lists them" has 0000:00:05.0 xl pci-assignable-list
  check "both" has 0000:00:06.0 xl pci-assignable-list
}
