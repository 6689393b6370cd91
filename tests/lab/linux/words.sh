# What differs from ../dom0/words.sh where there is no Xen: pcibackd runs on the embedded one, with the machine's devices through VFIO.
# And the words about VFIO:
#
#   bind_vfio BDF...            binds devices to vfio-pci, as an operator would by hand; unbind_vfio gives them back
#   group_of BDF                the number of its IOMMU group
#   refused TEXT COMMAND...     succeeds if the command fails and its output contains the text
#   new_guest NAME BDF...       makes a guest of the embedded Xen with these devices
#   drive NAME DRIVER STEP...   runs a driver in it, which is a process of its own, for its first device; NAME:NUMBER is another one of its devices,
#                               vfio:BDF a device without pcibackd
#   look NAME memory|io ADDRESS WIDTH   reads as this guest what one of its devices has there
#   resource BDF BAR            where a BAR is, as the kernel has it
#   end_guest NAME              destroys it
#   hidden BDF, not_hidden BDF   what pcibackd says of the device; neither is so if it does not answer
#   iommu_faults BDF            what the IOMMU has stopped of that device's DMA so far, by the kernel's log

bind_vfio() {
  local device
  for device in "$@"; do
    echo vfio-pci >"/sys/bus/pci/devices/$device/driver_override" || return
    [ ! -e "/sys/bus/pci/devices/$device/driver" ] || echo "$device" >"/sys/bus/pci/devices/$device/driver/unbind" || return
    echo "$device" >/sys/bus/pci/drivers_probe || return
    driven_by vfio-pci "$device" || return
  done
}

unbind_vfio() {
  local device
  for device in "$@"; do
    echo >"/sys/bus/pci/devices/$device/driver_override"
    echo "$device" >/sys/bus/pci/drivers/vfio-pci/unbind || return
    echo "$device" >/sys/bus/pci/drivers_probe
  done
}

group_of() { basename "$(readlink "/sys/bus/pci/devices/$1/iommu_group")"; }

hidden() { states_of "$1" | grep -q hidden; }

not_hidden() {
  local states
  states=$(states_of "$1") || return
  case "$states" in *hidden*) return 1 ;; esac
}

# What pcibackd lists of a device: nothing, if it does not have it
states_of() {
  local list
  list=$(pciback list) || return
  echo "$list" | sed -n "/^$1 /p"
}

iommu_faults() { dmesg | grep "DMAR: .*Request device \[${1#0000:}\]"; }

new_guest() {
  toolstack create "$@" >"$STATE/$1.domid" || { cat "$STATE/$1.domid"; rm "$STATE/$1.domid"; return 1; }
}

toolstack() { lab-guest toolstack $RUN_DIR "$@"; }

domid() { cat "$STATE/$1.domid"; }

drive() {
  local place="$1" driver="$2"
  shift 2
  case "$place" in
    vfio:*) ;;
    *:*) place=$RUN_DIR:$(domid "${place%:*}"):${place#*:} ;;
    *) place=$RUN_DIR:$(domid "$place") ;;
  esac
  lab-guest drive "$driver" "$place" "$@"
}

look() {
  local name="$1"
  shift
  lab-guest look $RUN_DIR "$(domid "$name")" "$@"
}

resource() { sed -n "$(($2 + 1))s/ .*//p" "/sys/bus/pci/devices/$1/resource"; }

end_guest() { toolstack destroy "$(domid "$1")" && rm "$STATE/$1.domid"; }

refused() {
  local text="$1" output
  shift
  output=$("$@" 2>&1) && { echo "it was not refused: $output"; return 1; }
  case "$output" in *"$text"*) ;; *) echo "no '$text' in: $output"; return 1 ;; esac
}

# --- as in dom0/words.sh

RUN_DIR=/run/pcibackd
PCIBACKD_FLAGS="--platform vfio $PCIBACKD_FLAGS"

stop_backend() {
  local file device failed=0
  for file in /sys/bus/pci/devices/*/driver_override; do
    device=$(basename "$(dirname "$file")")
    # It may have gone with another one of its group
    ! reserved_for_guests "$device" || pciback unhide --group "$device" || failed=1
  done
  kill "$(cat $STATE/pid)"
  wait_for 20 backend_is_gone || failed=1
  rm -f $STATE/pid
  return $failed
}

reserved_for_guests() { grep -q '^pciback$' "/sys/bus/pci/devices/$1/driver_override"; }

guests() { basename -a -s .domid $STATE/*.domid | grep -v '[*]'; }
destroy() { end_guest "$1"; }

post_mortem() {
  echo "--- the kernel"; dmesg | tail -n 40
  [ ! -e $LOG ] || { echo "--- pcibackd"; tail -n 100 $LOG; }
}
