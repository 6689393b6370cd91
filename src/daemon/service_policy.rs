//! The answers to [`Request::Set`](crate::control::protocol::Request::Set) and [`Request::Dropped`](crate::control::protocol::Request::Dropped).

use conf_space::Bdf;
use conf_space::overlay::{Field, Overlay, Permissive, Range, Ranges};
use conf_space::registers::{express, header, msi, msix};
use conf_space::selector::DeviceNames;

use xenbus::DomId;

use super::assignment::Assignment;
use super::service::DaemonService;
use crate::config::{AerSetting, Config, DeviceSettings, Setting};
use crate::control::policy::{DroppedLine, DroppedShown, SettingLine, SettingsShown, Suggestion};
use crate::control::protocol::Response;
use crate::host::devices::Device;
use crate::host::record::{Dropped, Phase, RunTime};
use crate::host::{Description, ReadOnly};
use crate::text::chain;

impl DaemonService {
    /// Sets what is asked for, all or nothing, and shows what holds then.
    pub(super) fn set(&self, device: &str, assignments: &[String]) -> Response {
        let told = || -> Result<SettingsShown, String> {
            let description = self.describe(device)?;
            let bdf = description.identity.bdf;
            let config = self.devices.config().get();
            let names = description.names();
            let hidden = self.devices.get(bdf);
            let mut run_time = hidden
                .as_ref()
                .map(|device| device.record.settings())
                .unwrap_or_default();
            if !assignments.is_empty() {
                let hidden = hidden.as_ref().ok_or_else(|| {
                    format!("{bdf} is not hidden; hide it first (pciback hide {bdf}), or write it into the configuration file")
                })?;
                run_time = self.change(hidden, &config.settings_for(&names), assignments)?;
                log::info!("{bdf}: set {}", assignments.join(" "));
            }
            Ok(SettingsShown {
                device: bdf,
                settings: lines(&config, &names, &run_time),
                until: hidden
                    .filter(|_| run_time != RunTime::default())
                    .map(|device| until(&device, &run_time)),
            })
        };
        match told() {
            Ok(shown) => Response::Settings(shown),
            Err(message) => Response::Failed { message },
        }
    }

    fn change(
        &self,
        device: &Device,
        file: &DeviceSettings,
        assignments: &[String],
    ) -> Result<RunTime, String> {
        let assignments: Vec<Assignment> = assignments
            .iter()
            .map(|text| text.parse())
            .collect::<Result<_, _>>()?;
        let overlay = self.overlay_of(&device.description)?;
        for assignment in &assignments {
            if let Assignment::Quirk(quirk) = assignment
                && let Some(refusal) = overlay.refuses(*quirk)
            {
                return Err(format!("quirk {quirk} would have no effect: {refusal}"));
            }
        }
        device.record.change_settings(|settings| {
            assignments
                .iter()
                .try_for_each(|assignment| assignment.apply_to(settings, file))
        })
    }

    /// The writes that were dropped, with what would let them through.
    pub(super) fn dropped(&self, device: &str) -> Response {
        let told = || -> Result<DroppedShown, String> {
            let description = self.describe(device)?;
            let bdf = description.identity.bdf;
            let hidden = self.devices.get(bdf).ok_or_else(|| {
                format!("{bdf} is not hidden: no guest has it, and nothing was dropped")
            })?;
            let fields: Vec<Field> = self.overlay_of(&hidden.description)?.fields().collect();
            let (dropped, elsewhere) = hidden.record.dropped();
            let writes: Vec<DroppedLine> =
                dropped.iter().map(|write| line(write, &fields)).collect();
            Ok(DroppedShown {
                device: bdf,
                of: whose(&hidden),
                suggestion: suggestion(&self.devices.settings(&hidden), &description, &writes),
                writes,
                elsewhere,
            })
        };
        match told() {
            Ok(shown) => Response::Dropped(shown),
            Err(message) => Response::Failed { message },
        }
    }

    fn describe(&self, device: &str) -> Result<Description, String> {
        let bdf: Bdf = device
            .parse()
            .map_err(|error| format!("{device}: {error}"))?;
        let description = self.devices.bus().describe(bdf);
        description.map_err(|error| chain(&error))
    }

    /// Looking at it does not touch the device.
    fn overlay_of(&self, description: &Description) -> Result<Overlay, String> {
        let config = self.devices.bus().open(description.identity.bdf);
        let config = config.map_err(|error| chain(&error))?;
        Overlay::new(&description.identity, &ReadOnly(&*config)).map_err(|error| chain(&error))
    }
}

fn lines(config: &Config, names: &DeviceNames, run_time: &RunTime) -> Vec<SettingLine> {
    let mut settings = config.settings_for(names);
    run_time.apply_to(&mut settings);
    let line = |name: &str, setting, value: String, at_run_time: bool| SettingLine {
        name: name.to_owned(),
        value,
        from: if at_run_time {
            "set at run time".to_owned()
        } else {
            config.origin_of(setting, names).to_string()
        },
        reasons: match setting {
            Setting::Permissive if !at_run_time => config.reasons_for(names),
            _ => Vec::new(),
        },
    };
    let quirks: Vec<String> = settings
        .quirks
        .iter()
        .map(|quirk| format!("\"{quirk}\""))
        .collect();
    let aer = settings.aer;
    vec![
        line(
            "permissive",
            Setting::Permissive,
            permissive(settings.permissive),
            run_time.permissive.is_some(),
        ),
        line(
            "quirks",
            Setting::Quirks,
            format!("[{}]", quirks.join(", ")),
            !run_time.quirks.is_empty(),
        ),
        line(
            "allow_interrupt_control",
            Setting::InterruptControl,
            settings.allow_interrupt_control.name().to_owned(),
            run_time.allow_interrupt_control.is_some(),
        ),
        line(
            "allow_shared_interrupt",
            Setting::SharedInterrupt,
            settings.allow_shared_interrupt.to_string(),
            run_time.allow_shared_interrupt.is_some(),
        ),
        line(
            "allow_shared_pages",
            Setting::SharedPages,
            settings.allow_shared_pages.to_string(),
            run_time.allow_shared_pages.is_some(),
        ),
        line(
            "reset",
            Setting::Reset,
            settings.reset.name().to_owned(),
            run_time.reset.is_some(),
        ),
        line(
            "host",
            Setting::Host,
            settings.host.name().to_owned(),
            false,
        ),
        line(
            "intx",
            Setting::Intx,
            settings.intx.name().to_owned(),
            false,
        ),
        line(
            "aer",
            Setting::Aer,
            format!(
                "{{ on_failure = \"{}\", timeout = {}, mmio_enabled = {} }}",
                aer.on_failure.name(),
                aer.timeout.as_secs(),
                aer.mmio_enabled
            ),
            run_time.aer != AerSetting::default(),
        ),
    ]
}

/// As the configuration file has it.
fn permissive(value: Permissive) -> String {
    match value {
        Permissive::No => "false".to_owned(),
        Permissive::Yes => "true".to_owned(),
        Permissive::Ranges(ranges) => list(&ranges),
    }
}

fn list(ranges: &Ranges) -> String {
    let ranges: Vec<String> = ranges.iter().map(|range| format!("\"{range}\"")).collect();
    format!("[{}]", ranges.join(", "))
}

/// When what was set at run time ends.
fn until(device: &Device, run_time: &RunTime) -> String {
    let owner = device
        .record
        .owner()
        .filter(|_| device.record.phase() == Some(Phase::Assigned));
    match (owner, run_time.meant_for) {
        (Some(owner), _) => format!("until domain {} gives the device back", owner.domain),
        (None, Some(domain)) => format!("for domain {domain}, which is about to get the device"),
        (None, None) => {
            "for the next guest that gets the device, until it gives it back".to_owned()
        }
    }
}

fn whose(device: &Device) -> String {
    let record = &device.record;
    // One that no guest has had yet is as dom0's.
    let owner = record.owner().filter(|owner| owner.domain != DomId::DOM0);
    match (record.phase(), owner) {
        (Some(Phase::Assigned), Some(owner)) => format!("domain {}", owner.domain),
        (_, Some(owner)) => format!("domain {}, which has had the device last", owner.domain),
        (_, None) => "no guest yet".to_owned(),
    }
}

fn line(write: &Dropped, fields: &[Field]) -> DroppedLine {
    let at = |field: &&Field| {
        field.offset <= write.offset && write.offset < field.offset.saturating_add(field.length)
    };
    let field = fields.iter().find(at);
    // Bytes behind a capability's last known register are most likely its own.
    let block = field
        .map(|field| field.block)
        .filter(|block| !block.is_empty())
        .or_else(|| {
            let mut before = fields.iter().rev();
            before
                .find(|field| field.offset <= write.offset && !field.block.is_empty())
                .map(|field| field.block)
        })
        .unwrap_or_default();
    DroppedLine {
        block: block.to_owned(),
        register: field.map_or("", |field| field.name).to_owned(),
        offset: write.offset,
        width: write.width.bytes(),
        count: write.count,
        last: write.last,
        never: never(block).map(str::to_owned),
        note: note(block, write, field).map(str::to_owned),
    }
}

/// Why registers of a block are not for guests.
fn never(block: &str) -> Option<&'static str> {
    if block == header::TYPE_0.name {
        Some("the header is the host's")
    } else if block == msi::block(0).name || block == msix::BLOCK.name {
        Some("Xen and pcibackd program it")
    } else if block == "SR-IOV" {
        Some("it makes new devices of dom0's")
    } else {
        None
    }
}

fn note(block: &str, write: &Dropped, field: Option<&Field>) -> Option<&'static str> {
    let register = field.map_or("", |field| field.name);
    if block == express::block(2).name && register == express::DEVICE_CONTROL.name {
        return Some(
            "bit 15 resets the device under the host's hands; with a quirk of mask 7fff instead of a range, the guest cannot",
        );
    }
    // The range of a write that reaches beyond its register opens the next one as well.
    let end = write.offset.saturating_add(write.width.bytes());
    let beyond = |field: &Field| end > field.offset.saturating_add(field.length);
    field
        .is_some_and(beyond)
        .then_some("it is written together with what follows it")
}

/// The least that lets these writes through, with what is allowed already.
fn suggestion(
    settings: &DeviceSettings,
    description: &Description,
    writes: &[DroppedLine],
) -> Option<Suggestion> {
    let mut more = Ranges::EMPTY;
    let mut all = match settings.permissive {
        Permissive::Ranges(ranges) => ranges,
        Permissive::No => Ranges::EMPTY,
        Permissive::Yes => return None,
    };
    let mut left_out = 0u32;
    for write in writes.iter().filter(|write| write.never.is_none()) {
        let range = Range::new(write.offset, write.offset.saturating_add(write.width)).ok()?;
        let (mut all_more, mut more_still) = (all, more);
        if all_more.insert(range).is_ok() && more_still.insert(range).is_ok() {
            (all, more) = (all_more, more_still);
        } else {
            left_out = left_out.saturating_add(1);
        }
    }
    let identity = &description.identity;
    let ranges: Vec<String> = more.iter().map(|range| range.to_string()).collect();
    (!more.is_empty()).then(|| Suggestion {
        command: format!("set {} permissive+={}", identity.bdf, ranges.join(",")),
        entry: format!(
            "[[device]]\nid = \"{:04x}:{:04x}\"\npermissive = {}\n",
            identity.vendor,
            identity.device,
            list(&all)
        ),
        left_out,
    })
}
