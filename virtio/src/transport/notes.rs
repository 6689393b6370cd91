//! Where the state of a device is kept, so that a restart of the daemon goes unnoticed: words of a mapped
//! file.
//!
//! ```text
//! word 0       the version of this layout; 0: nothing is noted yet
//! word 1       bits 0-15 device type, 16-31 number of queues, 32-47 words of the device model's own
//! next n       the size of each queue
//! next         which of the two copies of the registers is valid, 1 or 2; 0: neither
//! next         the registers, twice (`core::state`)
//! next         the MSI-X table: two words for each vector
//! next 32      the configuration space
//! next         the device model's own (`Device::keep`)
//! rest         the record of each queue (`queue::Record`)
//! ```
//!
//! Registers are written to the copy that is not valid, which then becomes valid by one store. So
//! whenever the process is killed, they are as before an access or as after it.

use std::fs::File;
use std::io;

use super::core::{DEVICE_WORDS, QUEUE_WORDS};
use crate::device::{Device, DeviceKind};
use crate::memory::Words;
use crate::queue::Record;

/// To be changed with the layout of anything that is noted.
const VERSION: u64 = u64::from_le_bytes(*b"virtio 2");

/// Words of a vector of MSI-X.
const VECTOR: usize = 2;
/// Words of a configuration space of 256 bytes.
const CONFIG_SPACE: usize = 32;
/// Version and shape.
const HEADER: usize = 2;

/// What is noted cannot be taken up.
#[derive(Debug, thiserror::Error)]
pub enum NotesError {
    /// The words have another layout.
    #[error(
        "the state was noted by another version of this program (layout {found:016x}, not {VERSION:016x}): run that version until the guest \
         is shut down"
    )]
    Version {
        /// What stands there.
        found: u64,
    },
    /// They are of a device with other queues, or of another type.
    #[error(
        "the state is that of another kind of device, or of one with other queues than this {kind:?} device has: run the version of this \
         program that the guest was started with until it is shut down"
    )]
    Shape {
        /// What the device is.
        kind: DeviceKind,
    },
    /// The words cannot be had.
    #[error("the state cannot be kept")]
    Words(#[from] io::Error),
}

/// The notes of one device.
#[derive(Debug, Clone)]
pub struct Notes {
    valid: Words,
    copies: [Words; 2],
    msix: Words,
    config_space: Words,
    device: Words,
    records: Vec<Record>,
}

/// Takes one part after the other.
struct Rest(Words);

impl Rest {
    fn next(&mut self, count: usize) -> Words {
        let part = self.0.part(0, count);
        self.0 = self.0.part(count, usize::MAX);
        part
    }
}

const fn registers(queues: usize) -> usize {
    DEVICE_WORDS.saturating_add(queues.saturating_mul(QUEUE_WORDS))
}

/// One vector for each queue, one for the configuration.
const fn msix(queues: usize) -> usize {
    queues.saturating_add(1).saturating_mul(VECTOR)
}

impl Notes {
    /// How many words the notes of `device` take.
    pub fn words(device: &dyn Device) -> usize {
        let sizes = device.queue_sizes();
        let queues = sizes.len();
        let fixed = [
            HEADER,
            queues,
            1,
            registers(queues),
            registers(queues),
            msix(queues),
            CONFIG_SPACE,
            device.kept_words(),
        ];
        let records = sizes.iter().map(|size| Record::words(*size));
        fixed
            .into_iter()
            .chain(records)
            .fold(0, usize::saturating_add)
    }

    /// Those of `device` in `words`, at least [`Notes::words`] of them: all zero, or what the same device
    /// noted before a restart.
    ///
    /// # Errors
    /// [`NotesError::Version`], [`NotesError::Shape`].
    pub fn new(words: Words, device: &dyn Device) -> Result<Self, NotesError> {
        let kind = device.kind();
        let sizes = device.queue_sizes();
        let queues = sizes.len();
        let mut rest = Rest(words);
        let header = rest.next(HEADER);
        let noted_sizes = rest.next(queues);
        let shape = u64::from(kind.id())
            | (queues as u64 & 0xffff) << 16
            | (device.kept_words() as u64 & 0xffff) << 32;
        match header.get(0) {
            0 => {
                for (index, size) in sizes.iter().enumerate() {
                    noted_sizes.set(index, (*size).into());
                }
                header.set(1, shape);
                header.set(0, VERSION);
            }
            VERSION => {
                let noted = (0..queues).map(|index| noted_sizes.get(index));
                if header.get(1) != shape || !noted.eq(sizes.iter().map(|size| u64::from(*size))) {
                    return Err(NotesError::Shape { kind });
                }
            }
            found => return Err(NotesError::Version { found }),
        }
        Ok(Self {
            valid: rest.next(1),
            copies: [rest.next(registers(queues)), rest.next(registers(queues))],
            msix: rest.next(msix(queues)),
            config_space: rest.next(CONFIG_SPACE),
            device: rest.next(device.kept_words()),
            records: sizes
                .iter()
                .map(|size| Record::new(rest.next(Record::words(*size))))
                .collect(),
        })
    }

    /// Those in `file`, which is made as long as they need.
    ///
    /// # Errors
    /// [`NotesError`].
    pub fn of_file(file: File, device: &dyn Device) -> Result<Self, NotesError> {
        Self::new(Words::of_file(file, Self::words(device))?, device)
    }

    /// Whether there is something from before a restart.
    pub(super) fn is_restart(&self) -> bool {
        self.valid.get(0) != 0
    }

    /// The registers that are valid.
    pub(super) fn registers(&self) -> &Words {
        let [first, second] = &self.copies;
        if self.valid.get(0) == 2 {
            second
        } else {
            first
        }
    }

    /// Has `write` write the registers, all of them, and makes that valid.
    pub(super) fn set_registers(&self, write: impl FnOnce(&Words)) {
        let [first, second] = &self.copies;
        let (copy, number) = if self.valid.get(0) == 1 {
            (second, 2)
        } else {
            (first, 1)
        };
        write(copy);
        self.valid.set(0, number);
    }

    pub(super) fn msix(&self) -> &Words {
        &self.msix
    }

    pub(crate) fn config_space(&self) -> &Words {
        &self.config_space
    }

    pub(super) fn device(&self) -> &Words {
        &self.device
    }

    pub(super) fn records(&self) -> &[Record] {
        &self.records
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn notes_of_another_version_or_of_another_device_are_refused() {
        let rng = Rng::new().unwrap();
        let words = Words::volatile(Notes::words(&rng)).unwrap();
        assert!(!Notes::new(words.clone(), &rng).unwrap().is_restart());
        assert!(Notes::new(words.clone(), &rng).is_ok());
        words.set(2, 128);
        let refused = Notes::new(words.clone(), &rng).unwrap_err();
        assert!(matches!(refused, NotesError::Shape { .. }), "{refused}");
        words.set(0, u64::from_le_bytes(*b"virtio 1"));
        let refused = Notes::new(words, &rng).unwrap_err();
        assert!(refused.to_string().contains("another version"), "{refused}");
    }

    #[test]
    fn registers_are_as_before_until_all_are_written() {
        let rng = Rng::new().unwrap();
        let words = Words::volatile(Notes::words(&rng)).unwrap();
        let notes = Notes::new(words.clone(), &rng).unwrap();
        notes.set_registers(|_| ());
        for value in 1..5 {
            let again = Notes::new(words.clone(), &rng).unwrap();
            notes.set_registers(|registers| {
                registers.set(0, value);
                assert_eq!(again.registers().get(0), value - 1);
                registers.set(1, value);
            });
            let found = again.registers();
            assert_eq!((found.get(0), found.get(1)), (value, value));
        }
    }
}
