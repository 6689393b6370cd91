# an HVM guest's legacy driver uses a transitional disk of pcibackd's by port, and another driver the same registers in memory
ALONE=yes
MACHINE=hvm
TIMEOUT=400
GUEST_TIMEOUT=250
story() {
  for disk in kernel own; do dd if=/dev/urandom of=/tmp/$disk.img bs=64k count=128 2>/dev/null; done
  mkdir -p /etc/pciback
  cat >/etc/pciback/pcibackd.toml <<'END'
[[guest.hvm.virtio]]
type = "blk"
path = "/tmp/kernel.img"
slot = "1f"
[[guest.hvm.virtio]]
type = "blk"
path = "/tmp/own.img"
slot = "1e"
legacy_in_memory = true
END
  must "the backend starts" start_backend
  must "an HVM guest starts" create_hvm_guest hvm
  check "its driver takes one disk, and is told to use the legacy interface" guest hvm '
    echo none >/sys/bus/pci/devices/0000:00:1e.0/driver_override
    modprobe virtio_pci force_legacy=1 && modprobe virtio_blk && wait_until [ -b /dev/vda ]'
  check "which it does" guest hvm 'grep virtio-pci-legacy /proc/ioports && [ "$(cut -c 33 /sys/bus/virtio/devices/virtio0/features)" = 0 ]'
  check "the disk has what is in its image" has "$(first_mib </tmp/kernel.img)" guest hvm 'sum_of /dev/vda'
  check "what the guest writes" eval 'guest hvm "write_noise /dev/vda" >/tmp/written'
  check "is in the image" has "$(first_mib </tmp/kernel.img)" cat /tmp/written

  check "another driver finds the registers of the other disk the same by port and in memory" has ' the same by both, 16384 sectors' \
    guest hvm 'lab-guest legacy 0000:00:1e.0'
  check "it reads that disk's first MiB" has "$(first_mib </tmp/own.img)" guest hvm 'lab-guest legacy-copy 0000:00:1e.0 0 4096 2048 | sha256sum'
  check "and has written it 2 MiB from the start" eval '[ "$(tail -c +2097153 /tmp/own.img | first_mib)" = "$(first_mib </tmp/own.img)" ]'
  check "the guest is destroyed" destroy hvm
}
