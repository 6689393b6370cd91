# an HVM guest writes and reads a disk of pcibackd's by packed rings without a pause while the backend is killed and starts again, many times: nothing is lost, nothing done twice
ALONE=yes
MACHINE=hvm
TIMEOUT=500
GUEST_TIMEOUT=300
story() {
  dd if=/dev/urandom of=/tmp/disk.img bs=64k count=128 2>/dev/null
  cp /tmp/disk.img /tmp/before.img
  mkdir -p /etc/pciback
  cat >/etc/pciback/pcibackd.toml <<'END'
[[guest.hvm.virtio]]
type = "blk"
path = "/tmp/disk.img"
queues = 2
packed = true
END
  must "the backend starts" start_backend
  must "an HVM guest with two CPUs starts" create_hvm_guest hvm 'vcpus=2'
  check "its driver takes the disk" guest hvm 'modprobe virtio_pci && modprobe virtio_blk && wait_until [ -b /dev/vda ]'
  check "with two queues" has 2 guest hvm 'ls /sys/block/vda/mq | wc -l'
  check "and packed rings" has RING_PACKED pciback virtio show hvm
  must "six jobs write and read" guest hvm 'start_hammer /dev/vda 6'
  for number in $(seq 8); do
    sleep "$(random_tenths 20)"
    # Every other time it is killed once more, while it starts or a moment later
    if [ $((number % 2)) = 0 ]; then
      kill_backend
      pcibackd $PCIBACKD_FLAGS >>$LOG 2>&1 &
      echo $! >$STATE/pid
      sleep "$(random_tenths 8)"
    fi
    check "killed, it starts again ($number)" restart_killed
  done
  sleep 1
  check "all jobs have found what they wrote, to the end" guest hvm end_hammer
  check "the guest's kernel has seen no error" guest hvm '! dmesg | grep -iE "virtio.*(error|not a head|broken)|I/O error|blocked for more"'
  check "the image is what the guest sees" has "$(sha256sum </tmp/disk.img | cut -d' ' -f1)" guest hvm 'dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | sha256sum'
  check "where nobody wrote, it is as it was" same_behind /tmp/before.img /tmp/disk.img
  check "the guest is destroyed" destroy hvm
  check "nothing of it is left in Xen" wait_for 10 no_zombie
}

# From 0 to so many tenths of a second
random_tenths() { seconds $(($(od -An -tu1 -N1 /dev/urandom) % ($1 + 1) * 10)); }

# The jobs have the first 3 MiB
same_behind() { [ "$(tail -c +3145729 "$1" | sha256sum)" = "$(tail -c +3145729 "$2" | sha256sum)" ]; }
