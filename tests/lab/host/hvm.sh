# The machine for HVM guests, of scenarios that say MACHINE=hvm: AMD's IOMMU and nested paging, and a dom0 that has Xen's QEMU. Sourced by ../run.
# shellcheck shell=bash disable=SC2154,SC2034

#   00:05.0, 00:06.0  e1000e, MSI-X
hvm_devices="-device amd-iommu
  -netdev user,id=net5 -device e1000e,bus=pcie.0,addr=5,netdev=net5,mac=52:54:00:00:00:05,romfile=
  -netdev user,id=net6 -device e1000e,bus=pcie.0,addr=6,netdev=net6,mac=52:54:00:00:00:06,romfile="

# QEMU 7.2, the Debian tree's own: QEMU 10 takes a guest's read of CR2 for one that is intercepted, so that Linux dies of its first page fault.
older_qemu=(env "QEMU_MODULE_DIR=$root/usr/lib/x86_64-linux-gnu/qemu"
  "$root/lib64/ld-linux-x86-64.so.2" --library-path "$root/lib/x86_64-linux-gnu:$root/usr/lib/x86_64-linux-gnu" "$root/usr/bin/qemu-system-x86_64"
  -L "$root/usr/share/qemu" -L "$root/usr/share/seabios")

# Not `-cpu max`: dom0 stumbles over SMAP, guests over RDTSCP. Debian's Xen has no shadow paging, so nested paging is needed.
hvm_qemu=("${older_qemu[@]}" -cpu "Westmere,+svm,+npt,vendor=AuthenticAMD")

# Three of eight guests died of a triple fault on two CPUs, none of a dozen on one. Xen had resumed them with a state that was not theirs: once it
# was Xen's own, as of the instruction behind VMRUN. So two threads of this QEMU, one for each CPU, get in each other's way.
hvm_cpus=1

hvm_programs="usr/libexec/xen-qemu-system-i386 usr/lib/xen-4.17/boot/hvmloader"

# What dom0 needs for HVM guests, as an archive: made once, as the bases are. Prints its name
hvm_base() {
  local recipe base d=$work/base/hvm
  recipe=$(cat "$lab/host/hvm.sh" "$lab/host/images.sh" | sha256sum | cut -c 1-12)
  base=$cache/images/hvm-$recipe.cpio
  if [[ ! -e $base ]]; then
    mkdir -p "$d"/{lab,usr/share/qemu,usr/share/seabios}
    add_programs "$d" "$hvm_programs"
    cp -r "$root"/usr/share/qemu/{linuxboot.bin,linuxboot_dma.bin,multiboot.bin,kvmvapic.bin,keymaps} "$d/usr/share/qemu/"
    cp "$root"/usr/share/seabios/*.bin "$d/usr/share/seabios/"
    cp "$kernel/vmlinuz" "$d/lab/vmlinuz"
    archive "$d" >"$base.part"
    mv "$base.part" "$base"
    rm -rf "$d"
  fi
  echo "$base"
}

# The guest's image, smaller: an HVM guest's kernel and image come through a port, two bytes at a time
hvm_guest() {
  mkdir -p "$work/hvm/lab"
  gzip -1 <"$work/dom0/lab/guest.img" >"$work/hvm/lab/guest.img.gz"
  hvm_disk
  boot_program counting-disk "$work/hvm/lab/counting.disk"
  truncate -s 1M "$work/hvm/lab/counting.disk"
  archive "$work/hvm"
}

# The disk that HVM guests boot from, of which boot-disk.S says what is where; and what that program is to say when it has read it: the BSD checksum of
# all from sector 8 on.
hvm_disk() {
  local d=$work/hvm/lab sectors sum
  sectors=$(($(od -An -tu1 -j $((0x1f1)) -N1 "$kernel/vmlinuz") + 1))
  head -c $((sectors * 512)) "$kernel/vmlinuz" >"$work/setup"
  objcopy -O binary -R .bss -R .brk -R .init.scratch "$kernel/vmlinux" "$work/image"
  cp "$work/dom0/lab/guest.img" "$work/initrd"
  truncate -s %512 "$work/image" "$work/initrd"
  boot_program boot-disk "$work/boot" --defsym "SETUP=$sectors" --defsym "IMAGE=$(sectors_of "$work/image")" \
    --defsym "INITRD=$(sectors_of "$work/initrd")"
  printf '%s' "console=hvc0 loglevel=4 rodata=off mitigations=off" >>"$work/boot"
  truncate -s 4096 "$work/boot"
  cat "$work/boot" "$work/setup" "$work/image" "$work/initrd" >"$d/hvm.disk"
  sum=$(tail -c +4097 "$d/hvm.disk" | sum | cut -d' ' -f1)
  printf 'INT 13h read %06d sectors, sum %s\n' $(($(sectors_of "$d/hvm.disk") - 8)) "$sum" >"$d/hvm.disk.read"
}

# boot_program SOURCE FILE FLAG...: what a BIOS loads from a disk's first sector
boot_program() {
  local source=$lab/host/$1.S file=$2
  shift 2
  as "$@" -o "$work/boot.o" "$source"
  ld -m elf_x86_64 -Ttext 0x7c00 -e start --oformat binary -o "$file" "$work/boot.o"
}

sectors_of() { echo $(($(stat -c %s "$1") / 512)); }
