//! One WebSocket of the load: frames that are ready go out, everything that has arrived is taken at once.

use anyhow::{Context, Result, bail};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{FutureExt, SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};

const BUFFER_BYTES: usize = 128 * 1024;
/// Frames taken in one turn, so that their acknowledgements are not held back for long.
const TURN_MAX: usize = 512;

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

pub struct Sink(SplitSink<Socket, Message>);

pub struct Frames(SplitStream<Socket>);

pub async fn open(url: &str) -> Result<(Sink, Frames)> {
    crate::lane::install_crypto();
    let config = WebSocketConfig::default().read_buffer_size(BUFFER_BYTES);
    let connected = connect_async_with_config(url, Some(config), true).await;
    let (socket, _) = connected.with_context(|| format!("cannot connect to {url}"))?;
    let (sink, frames) = socket.split();
    Ok((Sink(sink), Frames(frames)))
}

impl Sink {
    /// Takes a frame; it goes out when there are enough of them, or by `flush`.
    pub async fn feed(&mut self, frame: Vec<u8>) -> Result<()> {
        Ok(self.0.feed(Message::text(String::from_utf8(frame)?)).await?)
    }

    pub async fn flush(&mut self) -> Result<()> {
        Ok(self.0.flush().await?)
    }

    pub async fn send(&mut self, frame: String) -> Result<()> {
        Ok(self.0.send(Message::text(frame)).await?)
    }
}

impl Frames {
    /// The texts that have arrived, at least one. Cancel safe.
    pub async fn next(&mut self, into: &mut Vec<Utf8Bytes>) -> Result<()> {
        loop {
            take(self.0.next().await, into)?;
            while into.len() < TURN_MAX
                && let Some(frame) = self.0.next().now_or_never()
            {
                take(frame, into)?;
            }
            if !into.is_empty() {
                return Ok(());
            }
        }
    }
}

type Read = Option<Result<Message, tokio_tungstenite::tungstenite::Error>>;

fn take(read: Read, into: &mut Vec<Utf8Bytes>) -> Result<()> {
    match read {
        Some(Ok(Message::Text(text))) => into.push(text),
        Some(Ok(Message::Close(frame))) => bail!("the server closed the connection: {frame:?}"),
        Some(Ok(_)) => {}
        Some(Err(error)) => return Err(error).context("the connection broke"),
        None => bail!("the server hung up"),
    }
    Ok(())
}
