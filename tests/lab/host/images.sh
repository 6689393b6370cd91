# The images that boot: dom0's and the guests' initial RAM disks. Linux unpacks several cpio archives one after another, so each image is a base
# that is made once (busybox, Debian's programs with their libraries, kernel modules) and, behind it, what changes from run to run.
# Nothing is compressed: unpacking under emulation costs more than loading. Sourced by ../run.
# shellcheck shell=bash disable=SC2154

dom0_modules="xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs xen-pciback fuse e1000e igb nvme ahci sd_mod 8139too aer_inject brd tun bridge"
dom0_programs="usr/lib/xen-4.17/bin/xenstored usr/lib/xen-4.17/bin/xen-init-dom0 usr/lib/xen-4.17/bin/xl usr/lib/xen-4.17/bin/xenconsoled
  usr/lib/xen-4.17/bin/xenconsole usr/lib/xen-4.17/bin/libxl-save-helper usr/bin/xenstore-ls usr/bin/xenstore-list usr/bin/xenstore-read
  usr/bin/xenstore-write usr/bin/xenstore-rm usr/bin/xenstore-exists usr/bin/xenstore-watch usr/bin/lspci usr/bin/setpci usr/bin/strace usr/bin/ip
  usr/lib/x86_64-linux-gnu/libgcc_s.so.1"
guest_modules="xen-evtchn xen-gntalloc xen-pcifront e1000e igbvf 8139too 8139cp nvme ahci sd_mod virtio_pci virtio_mmio virtio_rng virtio_blk virtio_net virtio_console"
guest_programs="usr/bin/xenstore-ls usr/bin/xenstore-read usr/bin/xenstore-write usr/bin/xenstore-rm usr/bin/xenstore-watch
  usr/bin/lspci usr/bin/setpci usr/lib/x86_64-linux-gnu/libgcc_s.so.1"

# archive FOLDER: its content as a cpio archive
archive() { (cd "$1" && find . -mindepth 1 | LC_ALL=C sort | cpio -o -H newc --quiet); }

# add_programs FOLDER PROGRAMS: from the Debian tree, with their libraries
add_programs() {
  local d=$1 file from
  for file in $2; do
    mkdir -p "$d/$(dirname "$file")"
    cp -L "$root/$file" "$d/$file"
    for from in $(chroot "$root" ldd "/$file" 2>/dev/null | grep -oE '/[^ ]+'); do
      [[ -e $d/$from ]] || { mkdir -p "$d/$(dirname "$from")"; cp -L "$root/$from" "$d/$from"; }
    done
  done
}

# base_folder FOLDER MODULES PROGRAMS: fills it with busybox, the kernel modules and the programs of the Debian tree, with what they need
base_folder() {
  local d=$1 modules=$2 programs=$3 version file from
  version=$(ls "$kernel/lib/modules")
  mkdir -p "$d"/{bin,sbin,proc,sys,dev,tmp,run,root,mnt,lab,usr/bin,usr/sbin,usr/local/bin,etc/xen,"lib/modules/$version"} \
    "$d"/var/{lock,lib/xen,lib/xenstored,run/xenstored,run/xen,log/xen/console}
  touch "$d/etc/xen/xl.conf"
  cp /bin/busybox "$d/bin/"
  for file in $(/bin/busybox --list | grep -vxE 'busybox|lspci'); do ln -s busybox "$d/bin/$file"; done
  ln -s ../bin/busybox "$d/sbin/modprobe" # where the kernel looks for it; and for this, when xl asks a guest to shut down:
  printf '#!/bin/sh\nexec /bin/poweroff -f\n' >"$d/sbin/poweroff"
  chmod 755 "$d/sbin/poweroff"
  add_programs "$d" "$programs"
  for file in $modules; do modprobe -d "$kernel" -S "$version" --show-depends "$file" | awk '$1 == "insmod" {print $2}'; done | sort -u |
    while read -r from; do
      file=${from#"$kernel"/}
      mkdir -p "$d/$(dirname "$file")"
      cp "$from" "$d/$file"
    done
  cp "$kernel/lib/modules/$version"/modules.{builtin,builtin.modinfo,order} "$d/lib/modules/$version/"
  depmod -b "$d" "$version"
}

# Makes $dom0_base and $guest_base unless they are in the cache, under a name that changes with the recipe and the kernel
make_bases() {
  local recipe d
  recipe=$(cat "$lab/host/images.sh" <(ls -l --time-style=full-iso "$kernel/vmlinux") | sha256sum | cut -c 1-12)
  dom0_base=$cache/images/dom0-$recipe.cpio guest_base=$cache/images/guest-$recipe.cpio
  flock 9
  if [[ ! -e $dom0_base || ! -e $guest_base ]]; then
    echo "lab: making the base images (once)"
    mkdir -p "$cache/images"
    find "$cache/images" -name '*.cpio' -mtime +7 -delete
    d=$work/base
    base_folder "$d/guest" "$guest_modules" "$guest_programs"
    archive "$d/guest" >"$guest_base.part"
    base_folder "$d/dom0" "$dom0_modules" "$dom0_programs"
    cp "$kernel/vmlinux" "$d/dom0/lab/vmlinux"
    archive "$d/dom0" >"$dom0_base.part"
    mv "$guest_base.part" "$guest_base"
    mv "$dom0_base.part" "$dom0_base"
    rm -rf "$d"
  fi
  flock -u 9
  touch "$dom0_base" "$guest_base"
}

# Builds the programs under test and the guests' program; prints the folder they are in
build_programs() {
  local target packages=(-p lab-guest)
  [[ $backend == stock ]] || packages+=(-p pcibackd -p tools)
  (cd "$project" && cargo build --quiet --release "${packages[@]}") >&2
  target=$(cd "$project" && cargo metadata --no-deps --format-version 1 | grep -o '"target_directory":"[^"]*"' | cut -d '"' -f 4)
  echo "$target/release"
}

# The parts that change from run to run, all but the list of scenarios to play
make_images() {
  local dom0=$work/dom0 guest=$work/guest
  make_bases
  mkdir -p "$dom0/lab/scenarios" "$dom0/usr/local/bin" "$guest/lab" "$guest/usr/local/bin"
  cp "$bin/lab-guest" "$guest/usr/local/bin/"
  install -m 755 "$lab/guest/init" "$guest/init"
  cp "$lab/guest/words.sh" "$guest/lab/"
  { cat "$guest_base"; archive "$guest"; } >"$dom0/lab/guest.img"
  cp "$bin/lab-guest" "$dom0/usr/local/bin/"
  [[ $backend == stock ]] || cp "$bin/pcibackd" "$bin/pciback" "$dom0/usr/local/bin/"
  install -m 755 "$lab/dom0/init" "$dom0/init"
  cp "$lab/dom0/play" "$lab/dom0/play-all" "$lab/dom0/words.sh" "$dom0/lab/"
  cp "$lab"/scenarios/*.sh "$dom0/lab/scenarios/"
  mkdir -p "$work/linux/lab" "$work/linux/usr/local"
  cp -r "$dom0/lab/play" "$dom0/lab/play-all" "$dom0/lab/words.sh" "$dom0/lab/scenarios" "$work/linux/lab/"
  cp "$lab/linux/words.sh" "$work/linux/lab/linux-words.sh"
  cp -r "$dom0/usr/local/bin" "$work/linux/usr/local/"
  install -m 755 "$lab/linux/init" "$work/linux/init"
  for disk in sata nvme; do head -c 8M /dev/urandom >"$work/$disk.img"; done
  make_rom
}

# An expansion ROM (PCI 3.0, 6.3.1) of 16 blocks for a device that there is not, so that no firmware runs it, and of no code that any knows
make_rom() {
  {
    printf '\x55\xaa\x10'; head -c 21 /dev/zero
    printf '\x1c\0\0\0PCIR\xff\xff\xff\xff\0\0\x18\0\0\0\0\xff\x10\0\0\0\xff\x80\0\0'
    head -c 8140 /dev/urandom
  } >"$work/rom.img"
}
