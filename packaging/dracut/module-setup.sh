#!/bin/bash
# dracut: puts into the initramfs what reserves devices for pcibackd. Goes to /usr/lib/dracut/modules.d/90pciback.

check() { return 0; }

depends() { return 0; }

install() {
  # shellcheck disable=SC2154
  mkdir -p "$initdir/usr/lib/pciback"
  # A configuration that cannot be read is told of, and keeps no kernel from being installed.
  pciback persist --list >"$initdir/usr/lib/pciback/hide" || dwarn "pciback: the devices of 'hide' are not reserved at boot"
  inst_simple /usr/lib/pciback/reserve
  # Before udev, which loads drivers, and before the drivers that the command line asks for
  # shellcheck disable=SC2154
  inst_hook pre-udev 00 "$moddir/reserve.sh"
}
