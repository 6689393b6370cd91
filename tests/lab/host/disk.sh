# A dom0 as one installs it: a disk with Debian, its own initramfs, systemd, Xen's init scripts, and our package, installed by dpkg. For scenarios that
# say `DISK=yes`. Sourced by ../run.
# shellcheck shell=bash disable=SC2154
disk_root=$cache/disk # a Debian tree with all but our package

# Makes $disk_root unless it is in the cache. Its recipe is this function.
make_disk_root() {
  local log=$logs/disk.log recipe part=$disk_root.part
  recipe=$(declare -f make_disk_root | sha256sum)
  [[ $(cat "$disk_root/.recipe" 2>/dev/null) != "$recipe" ]] || return 0
  echo "lab: making the Debian tree $disk_root (once; log in $log)"
  rm -rf "$disk_root" "$part"
  cp -a "$root" "$part"
  mkdir "$part/debs"
  cp "$kernel"/debs/linux-image-*.deb "$part/debs/"
  # nothing is to be started here
  printf '#!/bin/sh\nexit 101\n' >"$part/usr/sbin/policy-rc.d"
  chmod 755 "$part/usr/sbin/policy-rc.d"
  printf '%s\n' 'LABEL=dom0 / ext4 defaults 0 1' >"$part/etc/fstab"
  echo dom0 >"$part/etc/hostname"
  echo 0123456789abcdef0123456789abcdef >"$part/etc/machine-id"
  {
    chroot "$part" sh -ec '
      export DEBIAN_FRONTEND=noninteractive LC_ALL=C
      apt-get purge -y -qq --autoremove "qemu-system-*" seabios
      apt-get update -qq
      apt-get install -y -qq --no-install-recommends systemd-sysv initramfs-tools busybox zstd dracut-core /debs/*.deb
      # what takes time and shows nothing here
      systemctl mask getty.target e2scrub_reap.service fstrim.timer apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer systemd-pstore.service
      rm -rf /debs /var/cache/apt/* /var/lib/apt/lists/* /usr/share/doc /usr/share/man /usr/share/locale /usr/sbin/policy-rc.d'
  } >"$log" 2>&1 </dev/null || { tail -n 20 "$log"; return 1; }
  mv "$part" "$disk_root"
  echo "$recipe" >"$disk_root/.recipe"
}

# make_disk PREPARATION SETTINGS: $work/disk.img with our package, and the settings for dom0; $work/initrd.img as update-initramfs made it.
# The preparation is a command that is run in the tree, with the package at /pcibackd.deb.
make_disk() {
  local tree=$work/disk log=$logs/disk-image.log
  flock 9
  make_disk_root
  cp -a "$disk_root" "$tree"
  flock -u 9
  PROGRAMS=$bin "$project/packaging/build" "$tree/pcibackd.deb" >/dev/null
  mkdir -p "$tree/lab/scenarios"
  cp "$lab"/dom0/{on-disk,play,play-all,words.sh} "$tree/lab/"
  cp "$lab/dom0/lab.service" "$tree/etc/systemd/system/"
  cp "$lab"/scenarios/*.sh "$tree/lab/scenarios/"
  cp "$2" "$tree/lab/settings"
  chroot "$tree" sh -exc "systemctl enable lab; $1" >"$log" 2>&1 </dev/null || { tail -n 20 "$log"; return 1; }
  cp -L "$tree/initrd.img" "$work/initrd.img"
  mke2fs -q -t ext4 -L dom0 -d "$tree" "$work/disk.img" 2G >/dev/null
  rm -rf "$tree"
}
