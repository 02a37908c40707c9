//! Control of an NVMe server.

use std::sync::Arc;

use block::AsyncDiskFile;
use serde_json::{Value, json};
use virtio_devices::nvme::{Namespace, NamespaceConfig, Subsystem};
use vmm_glue::vfio_user::NvmeFunction;

use super::{Arguments, Controlled, counters};
use crate::util::failure::Failure;

/// Opens what `--namespace` describes.
type Open =
    dyn Fn(&str) -> Result<(Box<dyn AsyncDiskFile>, NamespaceConfig), Failure> + Send + Sync;

/// An NVM subsystem and its controllers, under control.
pub(crate) struct NvmeControl {
    pub(crate) subsystem: Arc<Subsystem>,
    pub(crate) controllers: Vec<Arc<NvmeFunction>>,
    pub(crate) open: Box<Open>,
}

impl NvmeControl {
    fn namespace(&self, arguments: &mut Arguments) -> Result<Arc<Namespace>, String> {
        let nsid = arguments.number("nsid")?;
        self.subsystem
            .namespace(nsid)
            .ok_or_else(|| format!("there is no namespace {nsid}"))
    }

    fn status(&self) -> Value {
        let namespaces = self.subsystem.namespaces();
        let namespaces: Vec<Value> = namespaces.iter().map(|it| describe(it)).collect();
        let controllers = self.controllers.iter();
        let controllers: Vec<u16> = controllers.map(|it| it.controller().id()).collect();
        json!({
            "device": "nvme", "nqn": self.subsystem.config().nqn,
            "controllers": controllers, "namespaces": namespaces,
        })
    }

    fn counters(&self) -> Value {
        let of = |function: &Arc<NvmeFunction>| {
            let controller = function.controller();
            let workers = (0..controller.workers()).filter_map(|it| controller.stats(it));
            let workers: Vec<Value> = workers.map(|stats| counters(stats)).collect();
            json!({"controller": controller.id(), "workers": workers})
        };
        json!({"controllers": self.controllers.iter().map(of).collect::<Vec<_>>()})
    }

    fn add(&self, text: &str) -> Result<Value, String> {
        let (disk, config) = (self.open)(text).map_err(|failure| failure.to_string())?;
        let nsid = self.subsystem.add_namespace(disk, &config);
        Ok(json!({"nsid": nsid.map_err(|error| error.to_string())?}))
    }

    fn remove(&self, namespace: &Namespace, delete: bool) -> Result<Value, String> {
        let nsid = namespace.nsid();
        let removed = match (delete, namespace.pooled()) {
            (true, _) => self.subsystem.delete_namespace(nsid),
            (false, None) => self.subsystem.remove_namespace(nsid),
            (false, Some(image)) => {
                return Err(format!(
                    "namespace {nsid} was made in the pool: {} would bring it back at the next start; \
                     with --delete (\"delete\": true) image and sidecar are deleted, as a guest's delete-ns does",
                    image.display()
                ));
            }
        };
        removed.map_err(|error| error.to_string())?;
        // What is in flight ends, and the image is somebody else's to open.
        let closed = namespace.disk().close();
        closed.map_err(|error| error.to_string())?;
        Ok(json!({}))
    }
}

fn describe(namespace: &Namespace) -> Value {
    let disk = namespace.disk();
    json!({
        "nsid": namespace.nsid(), "image": disk.path().display().to_string(),
        "format": disk.format().to_string(), "size": disk.size(), "block-size": namespace.lba_size(),
        "pool": namespace.pooled().is_some(),
    })
}

impl Controlled for NvmeControl {
    fn commands(&self) -> &'static [&'static str] {
        &[
            "status",
            "counters",
            "add-namespace namespace=IMAGE[,OPTION=VALUE]…",
            "remove-namespace nsid=N [delete=true]",
            "resize nsid=N size=SIZE",
        ]
    }

    fn execute(&self, command: &str, arguments: &mut Arguments) -> Result<Value, String> {
        match command {
            "status" => {
                arguments.end()?;
                Ok(self.status())
            }
            "counters" => {
                arguments.end()?;
                Ok(self.counters())
            }
            "add-namespace" => {
                let text = arguments.text("namespace")?;
                arguments.end()?;
                self.add(&text)
            }
            "remove-namespace" => {
                let namespace = self.namespace(arguments)?;
                let delete = arguments.flag("delete")?;
                arguments.end()?;
                self.remove(&namespace, delete)
            }
            "resize" => {
                let namespace = self.namespace(arguments)?;
                let size = arguments.size("size")?;
                arguments.end()?;
                let resized = self.subsystem.resize_namespace(namespace.nsid(), size);
                resized.map_err(|error| error.to_string())?;
                Ok(describe(&namespace))
            }
            _ => Err(format!("unknown command '{command}'")),
        }
    }
}
