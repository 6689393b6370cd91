//! Traced operations as lines of text.

use std::fmt::Write;

use pcibackd::control::protocol::Response;
use pcibackd::control::traced::{Traced, TracedRegister};
use pcibackd::text::printable;

use super::duration;
use super::style::{Paint, Style};

/// Makes lines. Times count from the first.
#[derive(Debug)]
pub struct Lines {
    paint: Paint,
    begin_us: Option<u64>,
}

impl Lines {
    /// None yet.
    pub fn new(paint: Paint) -> Self {
        Self {
            paint,
            begin_us: None,
        }
    }

    /// A line, with its end.
    pub fn line(&mut self, answer: &Response) -> String {
        match answer {
            Response::Operation(traced) => self.operation(traced),
            Response::Lost { domain, operations } => {
                let told = format!("{operations} operations of domain {domain} were missed");
                format!("{}\n", self.paint.paint(Style::Bad, &told))
            }
            _ => String::new(),
        }
    }

    fn operation(&mut self, traced: &Traced) -> String {
        let begin = *self.begin_us.get_or_insert(traced.time_us);
        let since = traced.time_us.saturating_sub(begin);
        let device = match traced.device {
            Some(device) => device.to_string(),
            None => format!("({})", printable(&traced.seen_as)),
        };
        let mut line = format!(
            "{:>4}.{:06} {:>3} {:<8} {device} {:<11}",
            since / 1_000_000,
            since % 1_000_000,
            traced.domain,
            printable(&traced.guest),
            name(traced),
        );
        self.access(traced, &mut line);
        for register in &traced.registers {
            line.push_str("  ");
            self.register(register, &mut line);
        }
        let outcome = match traced.outcome.as_str() {
            "done" => String::new(),
            "absent" => self.paint.paint(Style::Faint, " absent"),
            "dropped" => self.paint.paint(Style::Notable, " dropped"),
            other => {
                let told = format!(" {} ({})", printable(other), traced.error);
                self.paint.paint(Style::Bad, &told)
            }
        };
        let took = format!("  {}", duration::short(traced.took_ns));
        line.push_str(&outcome);
        line.push_str(&self.paint.paint(Style::Faint, &took));
        line.push('\n');
        line
    }

    /// Where, and what.
    fn access(&self, traced: &Traced, line: &mut String) {
        let digits = match traced.size {
            Some(size @ (1 | 2)) => usize::try_from(size).unwrap_or(4).saturating_mul(2),
            _ => 8,
        };
        if let (Some(offset), Some(size)) = (traced.offset, traced.size) {
            let at = match u16::try_from(offset) {
                Ok(offset) => format!("{offset:#05x}"),
                Err(_) => offset.to_string(),
            };
            // A String takes whatever is written to it.
            let _ = write!(line, " {at}.{size}");
            if let Some(value) = traced.value {
                let _ = write!(
                    line,
                    " {value:>0digits$x}{:1$}",
                    "",
                    8usize.saturating_sub(digits)
                );
            }
        }
        if let Some(vectors) = traced.vectors {
            let plural = if vectors == 1 { "" } else { "s" };
            let _ = write!(line, " {vectors} vector{plural}");
            if let Some(pirq) = traced.value {
                let _ = write!(line, ", PIRQ {pirq}");
            }
        }
    }

    fn register(&self, register: &TracedRegister, line: &mut String) {
        let name = printable(&register.name);
        line.push_str(&self.paint.paint(Style::Heading, &name));
        if register.partial {
            line.push_str(" (part)");
        }
        let fields: Vec<String> = register
            .fields
            .iter()
            .map(|field| match field.flag {
                true => printable(&field.name),
                false => format!("{} {}", printable(&field.name), field.value),
            })
            .collect();
        if !fields.is_empty() {
            let _ = write!(line, ": {}", fields.join(", "));
        }
        if let Some(note) = &register.note {
            let _ = write!(line, ": {}", printable(note));
        }
    }
}

/// Short, as most lines are reads and writes.
fn name(traced: &Traced) -> String {
    match traced.command.as_str() {
        "conf_read" => "read".to_owned(),
        "conf_write" => "write".to_owned(),
        "unknown" => format!("op {}", traced.number),
        other => printable(other),
    }
}

#[cfg(test)]
mod tests {
    use pcibackd::control::traced::TracedField;

    use super::*;

    fn traced() -> Traced {
        let field = |name: &str, value| TracedField {
            name: name.to_owned(),
            value,
            flag: value == 1,
        };
        Traced {
            time_us: 5_000_000,
            domain: 3,
            guest: "web".into(),
            device: Some("03:00.0".parse().unwrap()),
            seen_as: "0000:00:00.0".into(),
            command: "conf_write".into(),
            number: 1,
            offset: Some(0x52),
            size: Some(2),
            value: Some(0x21),
            vectors: None,
            registers: vec![TracedRegister {
                block: "MSI".into(),
                name: "MSI Message Control".into(),
                offset: 0x52,
                value: 0x21,
                partial: false,
                fields: vec![field("MSI Enable", 1), field("Multiple Message Enable", 2)],
                note: None,
            }],
            outcome: "done".into(),
            error: 0,
            took_ns: 12_345,
        }
    }

    fn lines(all: Vec<Traced>) -> Vec<String> {
        let mut lines = Lines::new(Paint::NONE);
        let line = |traced| lines.line(&Response::Operation(Box::new(traced)));
        all.into_iter().map(line).collect()
    }

    #[test]
    fn a_line_tells_when_who_what_and_what_that_means() {
        let later = Traced {
            time_us: 6_000_123,
            command: "conf_read".into(),
            offset: Some(0x10),
            size: Some(4),
            value: Some(0xffff_c004),
            registers: vec![TracedRegister {
                block: "Header".into(),
                name: "BAR 0".into(),
                offset: 0x10,
                value: 0xffff_c004,
                partial: true,
                fields: Vec::new(),
                note: Some("16 KiB of memory".into()),
            }],
            ..traced()
        };
        let expected = [
            "   0.000000   3 web      0000:03:00.0 write       0x052.2 0021      MSI Message Control: MSI Enable, \
             Multiple Message Enable 2  12.3 µs\n",
            "   1.000123   3 web      0000:03:00.0 read        0x010.4 ffffc004  BAR 0 (part): 16 KiB of memory  12.3 µs\n",
        ];
        assert_eq!(lines(vec![traced(), later]), expected);
    }

    #[test]
    fn what_did_not_go_well_is_told() {
        let plain = Traced {
            registers: Vec::new(),
            ..traced()
        };
        let cases = [
            Traced {
                outcome: "dropped".into(),
                ..plain.clone()
            },
            Traced {
                outcome: "refused".into(),
                error: -2,
                value: None,
                offset: Some(-4),
                ..plain.clone()
            },
            Traced {
                outcome: "absent".into(),
                device: None,
                ..plain.clone()
            },
            Traced {
                command: "enable_msi".into(),
                offset: None,
                vectors: Some(1),
                value: Some(55),
                ..plain
            },
        ];
        let found = lines(cases.into());
        for (line, end) in found.iter().zip([
            "0000:03:00.0 write       0x052.2 0021     dropped  12.3 µs\n",
            "0000:03:00.0 write       -4.2 refused (-2)  12.3 µs\n",
            "(0000:00:00.0) write       0x052.2 0021     absent  12.3 µs\n",
            "0000:03:00.0 enable_msi  1 vector, PIRQ 55  12.3 µs\n",
        ]) {
            assert!(line.ends_with(end), "{line}");
        }
    }

    #[test]
    fn a_guests_name_cannot_move_the_cursor() {
        let traced = Traced {
            guest: "a\x1b[2J".into(),
            ..traced()
        };
        assert!(!lines(vec![traced]).concat().contains('\x1b'));
    }
}
